"""Advice: every sentence with its evidence, the evidence decides the sentence, and outside of it there is none."""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from aquilamoe.ablation import study as studies
from aquilamoe.ablation.advice import AdviceLine, Recorded, advise, load, rules
from aquilamoe.ablation.advice_query import AdviceQuery, GrowthSource, read_query
from aquilamoe.ablation.study import Study
from aquilamoe.config.messages import UserError
from aquilamoe.config.schema import ModelConfig
from invented_study import invent

REPOSITORY = Path(__file__).parents[2]
TYPED = {"source": "0.45M", "source_tokens": "2M", "target": "1.6M", "budget": "1M"}


def query(**changes: Any) -> AdviceQuery:
    def nowhere(text: str) -> GrowthSource:
        raise UserError(f"{text}: no such output")

    return read_query({**TYPED, **changes}, nowhere)


def recorded(study: Study) -> list[Recorded]:
    return [Recorded(study, "studies/x/summary.json")]


def of(topic: str, sentences: list[AdviceLine]) -> str:
    return "\n".join(sentence.text for sentence in sentences if sentence.topic == topic)


@pytest.mark.parametrize(
    ("control", "verdict"),
    [
        (3.6, "Grow rather than continue the source (prepare)"),
        (2.9, "Do not grow; continue the source"),
        (3.2, "Undecided"),
    ],
)
def test_the_evidence_decides_whether_to_grow(control: float, verdict: str) -> None:
    found = advise(query(), recorded(invent(ends={"fpi": 3.2, "aki": 3.3}, continued=control, noise=0.01)), [])
    assert verdict in of("whether", found)
    assert all("studies/x/summary.json: 'fpi'" in each.evidence for each in found if each.topic == "whether")


def test_the_better_the_control_the_less_growing_is_advised() -> None:
    order = ["Grow rather", "Undecided", "Do not grow"]
    places = []
    for control in (3.6, 3.4, 3.25, 3.21, 3.19, 3.15, 3.0, 2.8):
        text = of("whether", advise(query(), recorded(invent(ends={"fpi": 3.2, "aki": 3.3}, continued=control)), []))
        places.append(next(index for index, start in enumerate(order) if text.startswith(start)))
    assert places == sorted(places) and set(places) == {0, 1, 2}


@pytest.mark.parametrize(
    "changes",
    [
        {"source": "8B"},
        {"source_tokens": "45M"},
        {"budget": "100M"},
        {"target": "16M"},
        {"target": "8x0.45M"},
        {"source_tokens": None},
    ],
)
def test_outside_of_what_was_recorded_there_is_no_evidence_and_the_text_states_so(changes: Mapping[str, Any]) -> None:
    if changes.get("source") == "8B":
        changes = {**changes, "target": "30B", "source_tokens": "36B"}
    found = advise(query(**changes), recorded(invent(ends={"fpi": 3.2, "aki": 3.3})), [])
    assert len(found) == 4 and all(each.text.startswith("No recorded evidence") and not each.evidence for each in found)
    reason = of("whether", found)
    assert "recorded are sources of 450k" in reason or "scale-out" in reason or "source_tokens=N" in reason


def test_without_a_study_there_is_no_evidence() -> None:
    found = advise(query(), [], [])
    assert [each.topic for each in found] == ["whether", "how", "start", "rate"]
    assert all("no recorded study" in each.text or "as above" in each.text for each in found)


def test_how_names_all_that_lead_and_who_led_at_a_shorter_budget() -> None:
    crossing = invent(ends={"fpi": 3.3, "aki": 3.1}, starts={"fpi": 3.6, "aki": 5.5}, noise=0.002)
    text = of("how", advise(query(budget="0.5M"), recorded(crossing), []))
    assert text.startswith("'aki' leads after 1M tokens")
    tied = invent(ends={"fpi": 3.2, "aki": 3.2, "lemon": 3.6}, noise=0.02)
    text = of("how", advise(query(), recorded(tied), []))
    assert "lead after" in text and "do not separate them" in text and "'lemon'" not in text.split(" after ")[0]


@pytest.mark.parametrize(
    ("better", "words"), [(True, "From 20 tokens per parameter on"), (False, "At none of 5 and 20")]
)
def test_from_where_is_the_shortest_training_after_which_growing_beat_continuing(better: bool, words: str) -> None:
    short = invent(ends={"fpi": 3.4}, continued=3.1, source=(450_000, 2_250_000))
    long = invent(ends={"fpi": 3.0}, continued=3.3 if better else 2.9, source=(450_000, 9_000_000))
    both = _joined(short, long)
    text = of("start", advise(query(), recorded(both), []))
    assert text.startswith(words)


def test_the_rate_is_the_best_recorded_one_with_all_else_equal() -> None:
    found = invent(ends={"slow": 3.3, "fast": 3.1}, noise=0.002)
    entries = [
        entry.model_copy(update={"learning_rate": 1e-3 if entry.name == "slow" else 2e-3})
        if entry.control is None
        else entry
        for entry in found.entries
    ]
    sentences = advise(query(), recorded(found.model_copy(update={"entries": entries})), [])
    assert of("rate", sentences) == "0.002, 0.67 of the source's peak; it is at the edge of the range tried."
    assert "0.001: 3.299, 0.002: 3.099" in next(each.evidence for each in sentences if each.topic == "rate")


def test_the_studies_that_are_shipped_can_be_read_and_give_advice() -> None:
    shipped = load([REPOSITORY / "docs" / "studies"])
    assert len(shipped) >= 3
    small = query(source="40k", source_tokens="262k", target="166k", budget="82k")
    found = advise(small, shipped, [])
    assert all(
        of(topic, found) and "No recorded evidence" not in of(topic, found)
        for topic in ("whether", "how", "start", "rate")
    )


def test_published_rules_hold_within_their_range_and_are_cited() -> None:
    inside = advise(query(source="8.2B", source_tokens="3.6T", target="16.6B", budget="1.2T"), [], rules())
    published = [each for each in inside if each.text.startswith("Published")]
    assert {each.topic for each in published} == {"whether", "how", "rate"}
    assert all("arXiv" in each.evidence for each in published)
    assert not [each for each in advise(query(), [], rules()) if each.text.startswith("Published")]
    little = query(source="7B", source_tokens="2T", target="8x7B", budget="0.2T")
    much = query(source="7B", source_tokens="2T", target="8x7B", budget="6T")
    between = query(source="7B", source_tokens="2T", target="8x7B", budget="2T")
    assert "upcycle" in of("whether", advise(little, [], rules()))
    assert "from scratch" in of("whether", advise(much, [], rules()))
    assert "Published" not in of("whether", advise(between, [], rules()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": None}, "source: not set"),
        ({"budget": None}, "budget: not set"),
        ({"target": "0.4M"}, "target: 400000 parameters are not more than the source's 450000"),
        ({"target": "large"}, "target: 'large' is not a size"),
        ({"budget": "-3"}, "budget: '-3' is not a number"),
        ({"target": {"hidden_size": 128}}, "target: sizes to change need a source with a known shape"),
        ({"source": "prepar"}, "prepar: no such output"),
    ],
)
def test_an_impossible_query_is_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        query(**changes)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_sizes_that_change_and_budgets_in_flops_are_understood(network: Callable[..., ModelConfig]) -> None:
    model = network("qwen2")
    found = read_query(
        {**TYPED, "source": "prepare", "target": {"num_experts": 4, "num_experts_per_tok": 2}},
        lambda _: GrowthSource(model.num_params, 1e6, model),
    )
    assert found.kind == "scale_out" and found.target_params > found.active_params > model.num_params
    assert query(budget="9.6e12FLOPs").budget == pytest.approx(1e6)
    assert query(source_tokens="450000").source.tokens_per_parameter == 1.0


def test_the_command_reads_shipped_and_own_studies_and_imports_nothing_heavy(tmp_path: Path) -> None:
    own = tmp_path / "runs" / "ablations" / "mine" / studies.SUMMARY
    own.parent.mkdir(parents=True)
    own.write_text(studies.text(invent(ends={"fpi": 3.2, "aki": 3.3})), encoding="utf-8")
    words = [f"{key}={value}" for key, value in TYPED.items()]
    script = str(REPOSITORY / "workflows" / "ablations.py")
    command = [sys.executable, "-X", "importtime", script, "action=advise", *words]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "Grow rather than continue the source (prepare)" in result.stdout
    assert "runs/ablations/mine/summary.json: 'fpi'" in result.stdout
    loaded = {line.split("|")[-1].strip() for line in result.stderr.splitlines()}
    assert not loaded & {"torch", "ray", "mlflow", "matplotlib", "scipy", "transformers"}


def _joined(one: Study, other: Study) -> Study:
    """Two studies of one variant each as one of two, each with its own control and source."""

    def renamed(study: Study, name: str) -> dict[str, Any]:
        text = studies.text(study).replace('"fpi"', f'"{name}"').replace('"source"', f'"source {name}"')
        return dict(json.loads(text))

    first, second = renamed(one, "short"), renamed(other, "long")
    first["entries"] = sorted(first["entries"] + second["entries"], key=lambda entry: entry["control"] is not None)
    for index, entry in enumerate(entry for entry in first["entries"] if entry["control"]):
        entry["name"] += f" of {index}"
    first["ancestors"] |= second["ancestors"]
    first["axes"] = {"method": ["short", "long"]}
    return Study.model_validate(first)
