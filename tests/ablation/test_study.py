"""What an ablation's numbers support: judged, in sentences, in a file, and on a page."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aquilamoe.ablation import study, weight_metrics
from aquilamoe.ablation.conclusions import conclusions, horizon
from aquilamoe.ablation.study import Study
from aquilamoe.config.messages import UserError
from aquilamoe.reports import comparison
from aquilamoe.reports.comparison_curves import looks
from browser import Browser
from invented_study import invent


def sentences(study: Study, kind: str | None = None) -> str:
    return "\n".join(sentence.text for sentence in conclusions(study) if kind in (None, sentence.kind))


def test_a_study_is_the_same_after_it_was_written_and_read(tmp_path: Path) -> None:
    found = invent(ends={"fpi": 3.3, "aki": 3.2})
    path = tmp_path / study.SUMMARY
    path.write_text(study.text(found), encoding="utf-8")
    again = study.read(path)
    assert study.text(again) == study.text(found)
    assert [entry.rank for entry in again.ranked()] == [entry.rank for entry in found.ranked()]


@pytest.mark.parametrize(
    ("text", "message"), [("{", "cannot be read"), ('{"nam": 1}', "nam: unknown key; did you mean 'name'?")]
)
def test_a_file_that_is_no_study_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / study.SUMMARY).write_text(text)
    with pytest.raises(UserError) as caught:
        study.read(tmp_path / study.SUMMARY)
    assert message in str(caught.value) and "\n" not in str(caught.value) and study.SUMMARY in str(caught.value)


def test_the_first_sentence_is_the_ranks_with_their_horizon_and_ties_are_called_ties() -> None:
    clear = conclusions(invent(ends={"fpi": 3.30, "aki": 3.20, "lemon": 3.31}))[0].text
    assert "'aki' is best of 3" in clear and "-0.1" in clear and "1M tokens of dense" in clear
    tied = conclusions(invent(ends={"fpi": 3.200, "aki": 3.2001, "lemon": 3.5}, noise=0.02))[0].text
    assert "share the first rank" in tied and "do not separate them" in tied and "'lemon'" not in tied


def test_one_seed_ranks_nothing() -> None:
    found = invent(ends={"fpi": 3.3, "aki": 3.2}, seeds=(7,))
    assert "without an interval" in conclusions(found)[0].text
    assert {entry.rank for entry in found.ranked()} == {1}
    assert all(entry.to_baseline and entry.to_baseline.half_width is None for entry in found.ranked())


@pytest.mark.parametrize(
    ("control", "verdict"),
    [(3.5, "beats continuing"), (2.9, "does not beat continuing"), (3.2, "cannot be distinguished from")],
)
def test_the_verdict_on_growing_is_that_of_the_interval_against_its_control(control: float, verdict: str) -> None:
    found = invent(ends={"fpi": 3.2, "aki": 3.4}, continued=control, noise=0.01)
    text = sentences(found)
    assert f"'fpi', grown at 4.44 tokens per parameter, {verdict}" in text
    assert "equal FLOPs" in text


def test_of_several_learning_rates_the_control_has_the_one_that_serves_it_best() -> None:
    found = invent(ends={"fpi": 3.2, "aki": 3.4}, scratch={0.5: 3.45, 1.0: 3.6})
    (best,) = [entry for entry in found.controls if entry.control and entry.control.of is None]
    assert best.control is not None and best.control.learning_rate_ratio == 0.5
    assert math.isclose(best.control.differences["fpi"].mean, 0.25, abs_tol=0.03)


def test_a_crossing_is_a_warning_only_where_the_seeds_show_it() -> None:
    crosses = {"fpi": 3.3, "aki": 3.1}
    clear = invent(ends=crosses, starts={"fpi": 3.6, "aki": 4.4}, noise=0.005)
    assert "crossed, and the seeds separate both sides, by 'aki' at" in sentences(clear, "warning")
    assert "until" in sentences(clear, "warning"), "fpi leads at first"
    (crossing,) = clear.find("aki").crossings
    assert 0 < crossing.tokens < 1_000_000 and crossing.shown
    noisy = invent(ends={"fpi": 3.3, "aki": 3.299}, starts={"fpi": 3.6, "aki": 3.6}, noise=0.05)
    assert "crossed" not in sentences(noisy, "warning")


def test_a_saving_is_that_of_every_seed_or_none() -> None:
    found = invent(ends={"fpi": 3.2, "aki": 3.9}, scratch={1.0: 3.5})
    saving = found.find("fpi").saving
    assert saving is not None and saving.mean > 1 and saving.pairs == 3
    assert found.find("aki").saving is None
    assert "'aki' does not reach, in every seed, the loss that training from scratch ends with" in sentences(found)


def test_a_variant_without_a_result_is_named_with_its_reason_and_costs_no_other_a_rank() -> None:
    found = invent(ends={"fpi": 3.3, "aki": 3.2}, failed={"broken": "the loss is nan at step 3"})
    assert "'broken' has no result for seed 1, 2 and 3: the loss is nan at step 3." in sentences(found, "warning")
    assert [entry.name for entry in found.ranked()] == ["aki", "fpi"]
    nothing = invent(ends={}, failed={"fpi": "no result yet"})
    assert nothing.horizon is None and "no result yet that could be compared" in sentences(nothing)


def test_two_names_for_one_computation_are_reported() -> None:
    found = invent(ends={"fpi": 3.3, "aki": 3.2})
    twin = found.find("aki").model_copy(update={"name": "twin"})
    assert "two names" not in sentences(found)
    warning = sentences(found.model_copy(update={"entries": [*found.entries, twin]}), "warning")
    assert "'aki' and 'twin' gave the same numbers in every seed" in warning


def test_only_what_was_compared_with_scratch_falls_short_of_it() -> None:
    found = invent(ends={"fpi": 3.2, "aki": 3.9}, scratch={1.0: 3.5})
    narrowed = [
        entry.model_copy(
            update={
                "control": entry.control.model_copy(update={"differences": {"fpi": entry.control.differences["fpi"]}})
            }
        )
        if entry.control
        else entry
        for entry in found.entries
    ]
    assert "does not reach" not in sentences(found.model_copy(update={"entries": narrowed}))


def test_at_equal_flops_lines_are_compared_where_all_have_cost_the_same() -> None:
    found = invent(ends={"fpi": 3.3, "aki": 3.25}, tokens={"aki": 2_000_000})
    assert found.horizon is not None and found.horizon.equal_flops == found.horizon.lineage_flops
    long = found.find("aki").seeds[1]
    at = found.find("aki").equal_flops
    assert at is not None and long.loss < at < long.curve[0][2]
    assert horizon(found).startswith("1M tokens of dense (")


def test_the_page_has_every_sentence_and_every_figure_and_fits_a_narrow_window(
    browser: Browser, tmp_path: Path
) -> None:
    found = invent(
        ends={"fpi": 3.3, "aki": 3.2, "lemon": 3.25, "hypercloning": 3.35},
        scratch={1.0: 3.5},
        failed={"broken": "<nan>"},
    )
    page = comparison.write(found, tmp_path)
    for name, drawing in comparison.drawn(found).items():
        assert (tmp_path / "figures" / f"{name}.svg").read_text() == drawing.svg(), "the same numbers, the same bytes"
        assert (tmp_path / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    browser.open(page, 1280)
    text = str(browser.evaluate("document.body.innerText"))
    assert all(sentence.text in text for sentence in conclusions(found))
    assert "<nan>" in text and horizon(found) in text
    assert browser.evaluate("document.querySelectorAll('figure').length") == len(comparison.drawn(found)) >= 5
    for width in (1280, 400):
        for dark in (False, True):
            browser.open(page, width, dark)
            assert browser.evaluate("document.documentElement.scrollWidth") <= width
            assert browser.errors() == [] and len(browser.requests()) == 1
    seen = set()
    for _ in range(12):  # every table scrolls by the keyboard
        browser.press("TAB")
        seen.add(browser.evaluate("document.activeElement.getAttribute('aria-label')"))
    labels = browser.evaluate("[...document.querySelectorAll('.scroll')].map(e => e.getAttribute('aria-label'))")
    assert len(labels) == 4 and set(labels) <= seen


def test_variants_differ_in_colour_or_dashes() -> None:
    names = [f"v{index}" for index in range(20)]
    found = looks(invent(ends={name: 3 + index / 100 for index, name in enumerate(names)}, baseline="v0"))
    assert len({found[name] for name in names}) == 20


# What weights show


def test_the_effective_rank_counts_the_directions_that_a_matrix_uses() -> None:
    draw = np.random.default_rng(0)
    orthogonal, _ = np.linalg.qr(draw.normal(size=(24, 24)))
    assert math.isclose(weight_metrics.effective_rank(orthogonal), 1.0)
    assert math.isclose(weight_metrics.effective_rank(np.outer(draw.normal(size=24), draw.normal(size=12))), 1 / 12)
    half = np.concatenate([orthogonal[:12], orthogonal[:12]])
    assert math.isclose(weight_metrics.effective_rank(half), 0.5), "copies add no direction"
    assert weight_metrics.effective_rank(np.zeros((3, 4))) == 0.0


def test_the_similarity_of_experts_is_one_for_copies_and_zero_for_strangers() -> None:
    draw = np.random.default_rng(0)
    vector = draw.normal(size=1000)
    assert math.isclose(weight_metrics.mean_cosine({0: vector, 1: 2 * vector, 2: vector}), 1.0)
    strangers: dict[int, Any] = dict(enumerate(draw.normal(size=(4, 100_000))))
    assert abs(weight_metrics.mean_cosine(strangers)) < 0.01
