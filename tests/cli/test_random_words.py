"""Random overrides, by seed: whatever is typed, a plan is made or refused, in a few lines and without a traceback.

More of them than the tests try: `pytest -m slow tests/cli/test_random_words.py`.
"""

import random
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from aquilamoe.cli import program
from aquilamoe.cli.hydra_cli import composed

SEEDS, QUICK = range(300), range(0, 300, 15)
MAX_LINES = 4
FIRST: dict[str, list[str]] = {"run_pipeline": [], "ablate": ["ablation=init_noise"], "grow": ["growth=fpi"]}
VALUES = [
    *("-1", "0", "1", "2", "3", "64", "1e9", "1000000000", "1e12", "9223372036854775808", "18446744073709551616"),
    *("0.5", "1e-300", "1e300", "-1e300", "1e400", "inf", "nan", "-0.0", "1_000", "0x10", "1.5", "100000"),
    *("null", "true", "false", "", " ", "abc", "x" * 300, "结果", "a=b", "a,b", "(", "[", "]", "{", "'", '"', "~", "*"),
    *(
        "[]",
        "[1,2]",
        "[[1]]",
        "{}",
        "{a: 1}",
        "{kind: pretrain}",
        "[null]",
        "[" * 50,
        "[1" + ",1" * 3000 + "]",
        "../..",
    ),
    *("???", "${model}", "${nope}", "${oc.env:HOME}", "${", "\\", "\x1b[31m", "a\nb", "%", "#", "@", "range(1,3)"),
]


def keys(values: Any, where: str = "") -> Iterator[str]:
    if isinstance(values, Mapping):
        for name, inner in values.items():
            yield f"{where}{name}"
            yield from keys(inner, f"{where}{name}.")


def word(draw: random.Random, known: list[str]) -> list[str]:
    """A key as it is, or misspelt, or cut; a value; and a form, most often a plain one."""
    key, value = draw.choice(known), draw.choice(VALUES)
    key = draw.choice([key] * 6 + [key.rpartition(".")[2], key[:-1], f"{key}.x", key.upper(), f"{key}@x", ""])
    plain = [[f"{key}={value}"]] * 8
    return draw.choice([*plain, [f"+{key}={value}"], [f"++{key}={value}"], [f"~{key}"], [key], [f"--{key}", value]])


@pytest.fixture(scope="module")
def known() -> dict[str, list[str]]:
    programs = {"run_pipeline": program.PIPELINE, "ablate": program.ABLATIONS, "grow": program.GROW}
    return {name: sorted(keys(composed(programs[name], words)[0])) for name, words in FIRST.items()}


@pytest.fixture
def handlers() -> Iterator[None]:
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=() if seed in QUICK else pytest.mark.slow) for seed in SEEDS]
)
@pytest.mark.usefixtures("handlers")
def test_random_words_make_a_plan_or_are_refused_in_a_few_lines(
    seed: int,
    known: dict[str, list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    draw = random.Random(seed)
    name = draw.choice(["run_pipeline"] * 6 + ["ablate", "grow"])
    main: Callable[[], None] = getattr(program, name)
    words = [part for _ in range(draw.choice([1, 1, 1, 2, 3])) for part in word(draw, known[name])]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["workflows/x.py", *FIRST[name], *words, "action=plan"])
    status: Any = 0
    try:
        main()
    except SystemExit as end:
        status = end.code or 0
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    assert err == ""
    if isinstance(status, str):  # printed, with status 1
        assert out == ""
        lines = status.splitlines()
        assert len(lines) <= MAX_LINES, (words, lines)
        assert all(line.startswith("error: ") and line.isprintable() for line in lines), (words, lines)
    else:
        assert status == 0
    assert list(tmp_path.iterdir()) == []
