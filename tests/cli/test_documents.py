"""`until`, `action=list`, `action=report` and `json=true`: parts of a pipeline, and its facts for programs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aquilamoe.cli import advise
from aquilamoe.cli.commands import execute
from aquilamoe.config.messages import UserError

STUDIES = Path(__file__).parents[2] / "docs" / "studies"
Do = Callable[..., str]
LINE = ["corpus", "tokenizer", "tokens", "prepare"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("until") / "runs"


@pytest.fixture
def do(compose: Callable[..., Any], tiny: list[str], root: Path, capsys: pytest.CaptureFixture[str]) -> Do:
    """Do what the command does with these words, in this process; return what it prints."""

    def act(*words: str) -> str:
        execute(compose(*tiny, f"paths.root={root}", "tracking.enabled=false", *words), "a test")
        return capsys.readouterr().out

    return act


def test_a_run_until_a_stage_makes_what_that_stage_needs_and_nothing_else(do: Do, root: Path) -> None:
    do("until=prepare")
    assert sorted(path.name.rpartition("-")[0] for path in (root / "stages").iterdir()) == sorted(LINE)
    assert not (root / "reports").exists()


def test_the_json_of_a_plan_has_the_stages_in_order_and_their_costs(do: Do) -> None:
    do("until=prepare")
    plan = json.loads(do("action=plan", "json=true", "until=scale_up"))
    assert [stage["stage"] for stage in plan["stages"]] == [*LINE, "scale_up"]
    assert [stage["state"] for stage in plan["stages"]] == ["cached"] * 4 + ["runs"]
    prepare = plan["stages"][3]
    assert (prepare["tokens"], prepare["metrics"]["tokens"]) == (4096, 4096)
    assert plan["costs"]["prepare"]["own"]["flops"] == prepare["flops"] == prepare["metrics"]["flops"]
    status = json.loads(do("action=status", "json=true"))
    assert status["running"] is None
    assert [stage["stage"] for stage in status["stages"] if stage["metrics"]] == LINE


def test_a_list_has_every_output_and_names_what_is_damaged(do: Do, root: Path, tmp_path: Path) -> None:
    do("until=prepare")
    assert do("action=list").splitlines()[0].split() == [
        "stage",
        "kind",
        "fingerprint",
        "parameters",
        "tokens",
        "loss",
        "disk",
        "finished",
    ]
    listed = json.loads(do("action=list", "json=true"))
    assert [output["stage"] for output in listed["outputs"]] == LINE[::-1]
    assert listed["damaged"] == {}
    copy = tmp_path / "runs"
    shutil.copytree(root, copy)
    (record,) = copy.glob("stages/prepare-*/record.json")
    record.write_text("{}")
    damaged = json.loads(do("action=list", "json=true", f"paths.root={copy}"))["damaged"]
    assert list(damaged) == [str(record.parent)]


def test_the_json_of_a_lineage_leads_to_the_corpus(do: Do, root: Path) -> None:
    do("until=prepare")
    document = json.loads(do("action=lineage", "checkpoint=prepare", "json=true"))
    assert [output["stage"] for output in document["ancestors"]] == ["tokens", "corpus", "tokenizer"]
    assert Path(document["output"]["directory"]).parent == root / "stages"
    assert document["output"]["recipe"]["kind"] == "pretrain"


def test_what_cannot_be_done_is_one_line(do: Do) -> None:
    with pytest.raises(UserError, match=r"^until: there is no stage 'preparee'; did you mean 'prepare'"):
        do("until=preparee")
    with pytest.raises(UserError, match=r"^json: action=verify has no JSON document; these have: plan, status, list"):
        do("action=verify", "json=true")
    do("until=prepare")
    with pytest.raises(UserError, match=r"^report: scale_up, dense, .* of experiment embedded have no output yet; run"):
        do("action=report")


def test_a_finished_pipeline_keeps_its_summary_beside_its_report(finished_store: Path) -> None:
    (path,) = finished_store.glob("reports/*/summary.json")
    summary = json.loads(path.read_text())
    by_name = {stage["stage"]: stage for stage in summary["stages"]}
    assert {"corpus", "moe", "control", "export"} <= set(by_name)
    records = {
        name: json.loads((Path(stage["directory"]) / "record.json").read_text()) for name, stage in by_name.items()
    }
    assert {name: stage["metrics"] for name, stage in by_name.items()} == {
        name: record["metrics"] for name, record in records.items()
    }
    assert summary["finding"]["outcome"] in ("beat", "lost", "level")
    assert summary["finding"]["grown"] == "moe"
    assert summary["costs"]["pipeline"]["own"]["flops"] == sum(
        record["metrics"]["flops"] for record in records.values() if record["kind"] == "pretrain"
    )


def test_the_json_of_advice_has_every_statement_with_its_evidence(
    compose: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = compose(f"paths.root={tmp_path}") | {"json": True}
    query = {"source": "0.04M", "source_tokens": "2.6M", "target": "0.16M", "budget": "900k"}
    advise.run(query, experiment, STUDIES)
    document = json.loads(capsys.readouterr().out)
    assert (document["source"]["parameters"], document["budget_tokens"]) == (4e4, 9e5)
    assert {line["topic"] for line in document["advice"]} == {"whether", "how", "start", "rate"}
    assert any("summary.json" in line["evidence"] for line in document["advice"] if line["topic"] == "whether")
