"""Every sentence about a study against the interval that it stands on, and the kept studies against their numbers."""

import math
import random
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

import pytest

from aquilamoe.ablation import study
from aquilamoe.ablation.conclusions import conclusions
from aquilamoe.ablation.study import Entry, Study
from invented_study import invent

KEPT = sorted((Path(__file__).resolve().parents[2] / "docs" / "studies").glob("*/summary.json"))
QUANTILE = {2: 12.7062, 3: 4.30265, 4: 3.18245, 5: 2.77645}  # of Student's t, by the number of values


def bounds(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean, written down here once more."""
    half = QUANTILE[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values) - half, statistics.fmean(values) + half


def excludes(values: Sequence[float], what: float = 0.0) -> bool:
    low, high = bounds(values)
    return not low <= what <= high


def values(entry: Entry, other: Entry, figure: str | None = None) -> list[float]:
    """`entry - other` by seed."""
    pairs = [(entry.seeds[number], other.seeds[number]) for number in entry.seeds if number in other.seeds]
    if figure is None:
        return [one.value - two.value for one, two in pairs]
    return [one.figures[figure] - two.figures[figure] for one, two in pairs]


def quoted(text: str) -> list[str]:
    return re.findall(r"(?<![a-z])'([^']+)'(?![a-z])", text)


def check(kept: Study) -> int:
    """Assert that each sentence is what the interval carries; return how many were checked."""
    ranked, checked = kept.ranked(), 0
    first = ranked[0]
    for sentence in (each.text for each in conclusions(kept)):
        if " is best of " in sentence:
            assert all(excludes(values(entry, first)) for entry in ranked[1:]), sentence
        elif "share the first rank" in sentence:
            leading = [kept.find(name) for name in quoted(sentence)]
            assert not any(excludes(values(entry, first)) for entry in leading[1:]), sentence
        elif "a higher mean, but" in sentence:
            assert not any(excludes(values(kept.find(name), first)) for name in quoted(sentence)[:-1]), sentence
        elif sentence.startswith("From the first to the last"):
            low, high = bounds(values(kept.find(quoted(sentence)[0]), first))
            assert f"({low + 0.0:+.3f} to {high + 0.0:+.3f})" in sentence.replace("-0.000", "+0.000"), sentence
        elif "without growing it at equal" in sentence or "training from scratch at equal" in sentence:
            assert_verdict(kept, sentence)
        elif (
            "Most is saved by" in sentence or "Nothing is saved" in sentence or "anything is saved is open" in sentence
        ):
            assert_saving(kept, sentence)
        elif " ends lowest in " in sentence:
            key = "rank_end" if "effective rank" in sentence else "similarity_end"
            low_name, high_name = quoted(sentence)
            apart = excludes(values(kept.find(high_name), kept.find(low_name), key))
            assert apart != ("do not separate them" in sentence), sentence
        elif "is there after" in sentence and len(names := quoted(sentence.partition("is there after")[2])) == 1:
            early = quoted(sentence.partition("is there after")[0])[-1]
            apart = excludes(values(kept.find(names[0]), kept.find(early), "recovery_tokens"))
            assert apart != ("do not separate" in sentence), sentence
        else:
            continue
        checked += 1
    return checked


def assert_verdict(kept: Study, sentence: str) -> None:
    name = quoted(sentence)[0]
    kinds = {"from scratch": "scratch", "continuing": "continued"}
    kind = next(kind for words, kind in kinds.items() if words in sentence)
    equal = "flops" if "equal FLOPs" in sentence else "tokens"
    (control,) = [
        entry
        for entry in kept.controls
        if entry.control and name in entry.control.differences
        if entry.control.kind.startswith(kind) and entry.control.equal == equal
    ]
    low, high = bounds(values(control, kept.find(name)))
    expected = "beats" if low > 0 else "does not beat" if high < 0 else "cannot be distinguished from"
    assert f" {expected} " in sentence, sentence


def assert_saving(kept: Study, sentence: str) -> None:
    name = re.search(r"whole line of '([^']+)'", sentence)
    assert name is not None
    best = kept.find(name[1])
    low, high = bounds([math.log(value) for value in best.figure("saving")])
    expected = "Most" if low > 0 else "Nothing" if high < 0 else "Whether"
    assert sentence.startswith(expected), sentence
    assert f"({math.exp(low):.2f} to " in sentence or math.exp(low) < 0.005, sentence
    others = [entry for entry in kept.ranked() if entry.saving is not None and entry is not best]
    quotients = {
        entry.name: [math.log(best.seeds[n].figures["saving"] / s.figures["saving"]) for n, s in entry.seeds.items()]
        for entry in others
    }
    if expected == "Most":
        close = {name for name, logs in quotients.items() if not excludes(logs)}
        assert close == set(quoted(sentence.partition("the seeds do not distinguish")[2])), sentence


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.parent.name)
def test_the_sentences_of_a_kept_study_are_those_of_its_numbers(path: Path) -> None:
    found = study.read(path)
    check(found)
    page = (path.parent / "README.md").read_text(encoding="utf-8")
    listed = page.partition("from the numbers only.\n\n")[2].partition("\n\n")[0]
    assert listed.split("\n") == [f"- {sentence.text}" for sentence in conclusions(found)]
    for entry in found.variants:
        for seed in entry.seeds.values():
            if abs(seed.figures.get("loss_jump", 1.0)) < 1e-5:
                assert seed.figures["recovery_tokens"] == 0.0, "a growth that keeps the function was never left"


def test_no_sentence_claims_more_than_its_interval() -> None:
    draw = random.Random(1)
    checked = 0
    for _ in range(60):
        ends = {name: draw.gauss(3.3, 0.1) for name in ("fpi", "aki", "lemon", "random")}
        checked += check(
            invent(
                ends=ends,
                starts={name: draw.choice([3.6, 3.8, 4.5]) for name in ends},
                noise=draw.choice([0.003, 0.02, 0.1, 0.4]),
                seeds=tuple(range(draw.choice([2, 3, 5]))),
                continued=draw.gauss(3.3, 0.1),
                scratch={1.0: draw.gauss(3.4, 0.1)},
                source=(450_000, draw.choice([2_000_000, 400_000])),
            )
        )
    assert checked > 300


def test_two_seeds_are_warned_about_and_three_are_not() -> None:
    def warned(number: int) -> bool:
        found = invent(ends={"fpi": 3.3, "aki": 3.2}, seeds=tuple(range(number)))
        return any(each.text.startswith("Two seeds:") and each.kind == "warning" for each in conclusions(found))

    assert [warned(number) for number in (1, 2, 3)] == [False, True, False]


def test_what_scratch_ends_with_and_the_source_had_is_no_saving() -> None:
    found = invent(ends={"fpi": 3.2, "aki": 3.3}, starts={"fpi": 3.4, "aki": 3.4}, scratch={1.0: 3.7})
    text = "\n".join(sentence.text for sentence in conclusions(found))
    assert "a saving would not measure growing" in text and "Most is saved" not in text
    assert "does not reach" not in text and all(entry.saving is None for entry in found.variants)


def test_a_study_of_before_is_read_without_its_intervals_of_ratios_that_reached_below_zero(tmp_path: Path) -> None:
    found = invent(ends={"fpi": 3.2, "aki": 3.3}, scratch={1.0: 3.5})
    written = re.sub(
        r'"saving": \{\s*"mean": ([\d.]+),\s*"low": [\d.]+,\s*"high": [\d.]+,\s*"pairs": 3\s*\}',
        r'"saving": {"mean": \1, "half_width": 3.9, "pairs": 3}',
        study.text(found),
    )
    assert written.count('"half_width": 3.9') == 2
    (tmp_path / study.SUMMARY).write_text(written, encoding="utf-8")
    again = study.read(tmp_path / study.SUMMARY)
    assert all(entry.saving is None for entry in again.variants)
