"""What a user types: any character in a path, words in any order and form, and mistakes reported in our words."""

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from aquilamoe.cli import program
from aquilamoe.cli.hydra_cli import composed
from aquilamoe.cli.words import Program, quoted
from aquilamoe.config import graph, grow
from aquilamoe.config.keys import is_text
from aquilamoe.config.messages import UserError

pytestmark = pytest.mark.process

ROOT = Path(__file__).resolve().parents[2]
ABLATIONS, GROW, PIPELINE = program.ABLATIONS, program.GROW, program.PIPELINE
PATHS = {
    PIPELINE: [
        *("paths.root", "paths.remote", "tracking.uri", "data.folder", "data.sources.en.path", "evaluation.folder"),
        *("stages.tokenizer.path", "checkpoint", "other", "cluster.address", "data.sources.en.sha256", "name"),
    ],
    ABLATIONS: ["paths.root", "paths.remote", "source", "data.sources.zh.path", "ablation.objective.metric"],
    GROW: ["source", "target", "certificate.text"],
}
# As a shell hands them over.
TYPED = [
    *(
        "/a/lr=0.1",
        "a(1)",
        "a{b}c",
        "a[0]",
        "a,b",
        "a#b",
        "it's",
        'print "x"',
        "/结果/ü é",
        "~/runs",
        "a b",
        "a\\b",
        "a\\",
    ),
    *("s3://bucket/prefix?region=eu-west-1&scheme=http", "http://h:80/x?a=b#c", "012345678901", "1e10", "true", "[x"),
    *("a:b", "*.jsonl", "$HOME", "${x}", "a\\'b", "%20", "@x", "!x", "a|b;c", "x]", "{", "`x`", "null.txt", "-x", "+x"),
]


def one(program: Program, *words: str) -> dict[str, Any]:
    (values,) = composed(program, words)
    return values


def at(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values[part]
    return values


def refusal(program: Program, *words: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        composed(program, words)
    return str(caught.value).splitlines()


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.text(min_size=1) | st.text("\\'\"=,(){}[]#${}:? ü", min_size=1))
def test_any_text_survives_the_grammar_of_overrides(text: str) -> None:
    word = f"++key={quoted(text, with_quotes=True)}"
    found = OmegaConf.create({"key": OverridesParser.create().parse_override(word).value()})
    assert found["key"] == text


@pytest.mark.parametrize("of", PATHS, ids=lambda of: of.config_name)
def test_every_path_url_and_name_takes_every_character(of: Program) -> None:
    for key in PATHS[of]:
        assert is_text(of.schema, key), key
    extra = {ABLATIONS: ["ablation=scale_up"], PIPELINE: ["data=packs"], GROW: []}[of]
    for start in range(0, len(TYPED), len(PATHS[of])):  # every one of them, with some key
        words = {key: TYPED[(start + place) % len(TYPED)] for place, key in enumerate(PATHS[of])}
        values = one(of, *extra, *(f"{key}={text}" for key, text in words.items()))
        assert {key: at(values, key) for key in words} == words


def test_quotation_marks_around_a_path_are_the_users_of_a_prompt_the_texts() -> None:
    values = one(PIPELINE, "paths.root='a=b'", 'paths.remote="a,b"', 'prompt="Hello"', "tasks=a,b", "other=null")
    assert (values["paths"]["root"], values["paths"]["remote"], values["prompt"]) == ("a=b", "a,b", '"Hello"')
    assert (values["tasks"], values["other"]) == ("a,b", None)


def test_a_path_may_read_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", "/scratch")
    assert one(PIPELINE, "paths.root=${oc.env:SCRATCH}/runs")["paths"]["root"] == "/scratch/runs"


def pasted(page: str) -> list[list[str]]:
    """The words of the commands of a page, as bash hands them to the program."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8").replace("\\\n", "")
    lines = [line for line in text.splitlines() if line.startswith("python workflows/") and "=DIR" not in line]
    script = "\n".join(["python() { printf '%s\\0' \"$@\"; printf '\\n'; }", *lines])
    completed = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [line.rstrip("\0").split("\0") for line in completed.splitlines()]


@pytest.mark.parametrize("page", ["cluster.md", "watching.md", "findings.md"])
def test_the_commands_of_a_page_are_valid_as_they_are_pasted(page: str) -> None:
    commands = pasted(page)
    assert commands
    for script, *words in commands:
        of = {"efficientscale": PIPELINE, "ablations": ABLATIONS}[Path(script).stem]
        values = one(of, *words)
        if of is PIPELINE:
            graph.build(graph.parse(values))
        typed = dict(word.split("=", 1) for word in words)
        if "paths.remote" in typed:
            assert values["paths"]["remote"] == typed["paths.remote"]


@pytest.mark.parametrize(
    ("of", "words"),
    [
        (ABLATIONS, ["experiment=laboratory", "ablation=init_noise", "seeds=2"]),
        (PIPELINE, ["experiment=smoke", "growth=fpi", "seed=5"]),
        (GROW, ["growth=fpi", "growth.noise=0.25", "source=a", "target=b"]),
    ],
    ids=lambda value: value.config_name if isinstance(value, Program) else "",
)
def test_words_mean_the_same_in_every_order_and_form(of: Program, words: list[str]) -> None:
    expected = one(of, *words)
    assert one(of, *reversed(words)) == expected
    assert one(of, *(f"+{word}" for word in words)) == expected
    assert one(of, *(f"++{word}" for word in words[1:]), words[0]) == expected
    if of is ABLATIONS:
        assert expected["name"] == "ablation_init_noise"


@pytest.mark.parametrize(
    ("of", "words", "line"),
    [
        (PIPELINE, ["--nosuch"], "--nosuch: no such option; settings are written KEY=VALUE, e.g. nosuch=VALUE"),
        (GROW, ["--source", "X"], "--source: no such option; settings are written KEY=VALUE, e.g. source=X"),
        (PIPELINE, ["seed=1", "--lr=3"], "--lr=3: no such option; settings are written KEY=VALUE, e.g. lr=3"),
        (PIPELINE, ["--config-dir", "nowhere"], "--config-dir: nowhere: no such directory"),
        (PIPELINE, ["--config-dir"], "--config-dir/-cd: expected one argument"),
        (PIPELINE, ["--config-name", "x"], "--config-name: this program is configured by conf/config.yaml"),
        (PIPELINE, ["--cfg", "bad"], "--cfg/-c: 'bad' is not a choice; valid: all, hydra, job"),
        (PIPELINE, ["seed=1,2"], "seed=1,2: several values; write [1,2] for a list, or add --multirun"),
        (PIPELINE, ["-m", "seed=range(0,1000000000)"], "--multirun: 1000000000 combinations, at most 1000 are run"),
        (PIPELINE, ["seed"], "seed: is not a setting; write KEY=VALUE"),
        (PIPELINE, ["data=/my/a.jsonl"], "data=/my/a.jsonl: names a configuration of conf/data"),
        (PIPELINE, ["experiment=my/own.yaml"], "experiment=my/own.yaml: names a configuration of conf/experiment"),
        (
            PIPELINE,
            ["ablation=scale_up"],
            "ablation=scale_up: efficientscale.py has no ablations; they belong to python",
        ),
        (GROW, ["+experiment=7b"], "experiment=7b: grow.py has no experiments; they belong to python workflows/eff"),
        (GROW, ["growth=fip"], "growth=fip: there is no conf/growth/fip.yaml; did you mean 'fpi'?"),
        (PIPELINE, ["~seed"], "seed: is needed by stages.prepare.seed, and is not set"),
        (PIPELINE, ["stages=[1]"], "stages: cannot be set "),
        (PIPELINE, [f"seed={'[' * 3000}{']' * 3000}"], "seed: 3000 nested brackets, at most 20 are read"),
        (ABLATIONS, [f"seeds=[{'1,' * 50_000}1]"], "seeds: a list or mapping of 100003 characters, at most 4000"),
    ],
    ids=lambda value: "" if isinstance(value, (Program, list)) else value[:20],
)
def test_a_wrong_word_is_one_line_in_our_words(of: Program, words: list[str], line: str) -> None:
    (found,) = refusal(of, *words)
    assert found.startswith(line)


def test_all_wrong_words_are_named_at_once() -> None:
    lines = refusal(PIPELINE, "seed", "growth=fip", "data=x.jsonl")
    assert [line.partition(":")[0] for line in lines] == ["seed", "growth=fip", "data=x.jsonl"]


def test_multirun_composes_every_combination_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = composed(PIPELINE, ["-m", "seed=1,2", "growth=fpi,aki"])
    assert [(each["seed"], each["growth"]["method"]) for each in found] == list(product([1, 2], ["fpi", "aki"]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("group", "of"), [("experiment", PIPELINE), ("ablation", ABLATIONS)])
def test_a_file_that_does_not_state_where_its_keys_belong_is_named(
    group: str, of: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "conf" / group / "own.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("# My own.\nname: own\n")
    (line,) = refusal(of, f"{group}=own")
    assert line == f"{own}: begins without the line '# @package _global_', which sets where its keys belong; add it"
    own.write_text("# @package _global_\n# My own.\nname: own\n")
    assert one(of, f"{group}=own")["name"] == "own"
    own.write_text("# @package _global_\nname: [own\n")
    assert "is not valid YAML" in refusal(of, f"{group}=own")[0]


def test_a_minimal_corpus_and_a_minimal_ablation_are_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for group, text in {
        "data": "sources:\n  en: {path: a.jsonl}\n  fr: {path: b.jsonl}\n",
        "ablation": "# @package _global_\nablation:\n  axes:\n    noise:\n      values: {a: [upcycling=copy], b: "
        "[upcycling=drop]}\n      baseline: a\n  objective: {stage: moe, metric: loss_end}\n",
    }.items():
        (tmp_path / "conf" / group).mkdir(parents=True)
        (tmp_path / "conf" / group / "own.yaml").write_text(text)
    experiment = graph.parse(one(PIPELINE, "data=own"))
    assert experiment.data.mixture == experiment.stages["prepare"].mixture == {"en": 1.0, "fr": 1.0}  # type: ignore[union-attr]
    assert experiment.data.validation_fraction == experiment.stages["corpus"].validation_fraction == 0.05  # type: ignore[union-attr]
    values = one(ABLATIONS, "ablation=own")
    ABLATIONS.schema.model_fields["ablation"].annotation.model_validate(  # type: ignore[union-attr]
        {**values["ablation"], **{key: values[key] for key in ("seeds", "scheduler", "trial_cpus")}}
    )


def test_a_source_that_is_null_is_no_part_of_the_corpus() -> None:
    experiment = graph.parse(one(PIPELINE, "data.sources.zh=null"))
    graph.build(experiment)
    assert set(experiment.data.sources) == set(experiment.data.mixture) == {"en"}
    assert set(experiment.stages["corpus"].sources) == set(experiment.stages["moe"].mixture) == {"en"}  # type: ignore[union-attr]


def test_the_growth_tool_names_all_that_is_missing() -> None:
    with pytest.raises(UserError) as caught:
        grow.parse(one(GROW, "growth=fpi"))
    assert [line.partition(":")[0] for line in str(caught.value).splitlines()] == ["source", "target"]
    with pytest.raises(UserError, match=r"growth.noise: 0.5 of no growth; name one, e.g. growth=fpi"):
        grow.parse(one(GROW, "source=a", "target=b", "growth.noise=0.5"))


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Any]]:
    """Run a program in this process as its script does: its exit status, and what it prints on both streams."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}

    def run(main: Callable[[], None], *words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [f"workflows/{main.__name__}.py", *words])
        capsys.readouterr()
        try:
            main()
            status = 0
        except SystemExit as end:
            status = 0 if end.code is None else end.code if isinstance(end.code, int) else 1
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
        return status, *capsys.readouterr()

    yield run
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("main", [program.run_pipeline, program.grow, program.ablate], ids=lambda main: main.__name__)
def test_every_program_has_a_help_of_its_own(typed: Callable[..., Any], main: Callable[[], None]) -> None:
    status, out, _ = typed(main, "--help")
    name = {"run_pipeline": "efficientscale", "grow": "grow", "ablate": "ablations"}[main.__name__]
    assert status == 0
    others = {"efficientscale", "grow", "ablations"} - {name}
    assert f"python workflows/{name}.py" in out
    assert not any(f"python workflows/{other}.py" in out for other in others)
    assert " ".join(out.split()).count("Seed of ") == 1


@pytest.mark.parametrize(
    ("main", "words", "line"),
    [
        (program.ablate, ["ablation=scale_up", "seeds=1e9"], "ablation.seeds: 1,000,000,000 seeds, at most 1,000"),
        (program.ablate, ["ablation=scale_up", "-m", "seed=1,2"], "--multirun: an ablation runs all of its variants"),
        (program.run_pipeline, ["scale.width=1e9"], "model.hidden_size: 40 is not divided by scale.width 1000000000"),
        (program.run_pipeline, ["scale.width=1e99"], "scale.width: 1e+99 is refused"),
        (program.run_pipeline, ["seed=18446744073709551616"], "seed: 18446744073709551616 is refused: input should be"),
        (program.run_pipeline, ["seed=-1"], "seed: -1 is refused: input should be greater than or equal to 0"),
        (program.grow, ["source=org/name", "target=x", "growth=fpi"], "hf download org/name --local-dir name"),
    ],
    ids=lambda value: "" if isinstance(value, list) else getattr(value, "__name__", "")[:20],
)
def test_a_wrong_size_or_number_is_one_line(
    typed: Callable[..., Any],
    main: Callable[[], None],
    words: list[str],
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = typed(main, "action=plan", *words)
    assert (status, out) == (1, "")
    assert line in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_without_an_experiment_the_first_one_runs_and_the_larger_one_is_a_word_away() -> None:
    first, text = graph.parse(one(PIPELINE)), graph.parse(one(PIPELINE, "experiment=demo_text"))
    assert (first.name, text.name) == ("embedded", "demo_text")
    assert one(PIPELINE, "experiment=embedded", "seed=2") == one(PIPELINE, "seed=2")
    nodes = graph.build(first)
    source, control = nodes["prepare"], nodes["control"]
    assert source.model is not None and 60 < source.tokens / source.model.num_params < 66
    assert nodes["scale_up"].stage.growth.method == "hypercloning"  # type: ignore[union-attr]
    assert graph.build(graph.parse(one(PIPELINE, "growth=aki_pro")))["scale_up"].stage.growth.method == "aki_pro"  # type: ignore[union-attr]
    assert abs(control.lineage_flops / nodes["moe"].lineage_flops - 1) < 1e-3
    assert control.stage.schedule.decay_tokens == pytest.approx(control.tokens / 2, rel=0.01)  # type: ignore[union-attr]


def test_an_ablation_has_no_experiment_that_is_not_named() -> None:
    (values,) = composed(ABLATIONS, ["ablation=scale_up"])
    assert values["model"]["hidden_size"] == 64
