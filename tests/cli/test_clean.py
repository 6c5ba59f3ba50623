"""`action=clean`: what nothing in a store needs any more is listed, and goes when the user confirms."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aquilamoe.cli.commands import execute
from aquilamoe.config.messages import UserError
from aquilamoe.lineage import unused as unused_outputs
from aquilamoe.lineage.unused import REMOVED
from aquilamoe.pipeline.store import Store

Do = Callable[..., str]


@pytest.fixture
def root(tmp_path: Path, finished_store: Path) -> Path:
    shutil.copytree(finished_store, tmp_path / "runs")
    return tmp_path / "runs"


@pytest.fixture
def do(compose: Callable[..., Any], tiny: list[str], root: Path, capsys: pytest.CaptureFixture[str]) -> Do:
    def act(*words: str) -> str:
        execute(compose(*tiny, f"paths.root={root}", "tracking.enabled=false", *words), "a test")
        return capsys.readouterr().out

    return act


def stages(root: Path) -> set[str]:
    return {path.name.rpartition("-")[0] for path in (root / "stages").iterdir()}


def forget_reports(root: Path) -> None:
    shutil.rmtree(root / "reports")


def listed(text: str) -> list[str]:
    return sorted(Path(each["directory"]).name.rpartition("-")[0] for each in json.loads(text)["directories"])


def test_the_outputs_of_this_experiment_are_needed(do: Do, root: Path) -> None:
    forget_reports(root)
    before = stages(root)
    assert "needed" in do("action=clean", "confirm=true")
    assert stages(root) == before


def test_the_outputs_of_a_reported_experiment_are_needed_by_every_other(do: Do, root: Path) -> None:
    assert listed(do("action=clean", "json=true", "seed=7")) == []


def test_without_a_report_another_experiment_needs_only_what_both_share(do: Do, root: Path) -> None:
    forget_reports(root)
    before = stages(root)
    kept = {"corpus", "tokenizer", "tokens"}
    assert listed(do("action=clean", "json=true", "seed=7")) == sorted(before - kept)
    printed = do("action=clean", "seed=7")
    assert "Nothing was removed" in printed and "confirm=true" in printed
    assert stages(root) == before
    do("action=clean", "confirm=true", "seed=7")
    assert stages(root) == kept


def test_what_an_ablation_compares_is_needed_with_everything_it_was_made_from(do: Do, root: Path) -> None:
    forget_reports(root)
    (dense,) = (root / "stages").glob("dense-*")
    summary = root / "ablations" / "methods" / "summary.json"
    summary.parent.mkdir(parents=True)
    summary.write_text(json.dumps({"entries": [{"seeds": {"1": {"fingerprint": dense.name.rpartition("-")[2]}}}]}))
    do("action=clean", "confirm=true", "seed=7")
    assert stages(root) == {"corpus", "tokenizer", "tokens", "prepare", "scale_up", "dense"}


def test_interrupted_work_of_this_experiment_is_kept_and_that_of_others_is_listed(do: Do, root: Path) -> None:
    (dense,) = (root / "stages").glob("dense-*")
    own, other = dense.with_name(f"{dense.name}.partial"), dense.with_name("dense-0123456789ab.partial")
    dense.rename(own)
    shutil.copytree(own, other)
    printed = do("action=clean", "confirm=true")
    assert "interrupted" in printed and own.is_dir() and not other.exists()


def test_an_interrupted_removal_leaves_no_output_and_is_finished_by_the_next(
    do: Do, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget_reports(root)

    def interrupted(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(unused_outputs.shutil, "rmtree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            do("action=clean", "confirm=true", "seed=7")
    (left,) = (root / "stages").glob(f"*{REMOVED}")
    stage, _, fingerprint = left.name.removesuffix(REMOVED).rpartition("-")
    assert Store(root).find(stage, fingerprint) is None
    assert not any(record["fingerprint"] == fingerprint for record in Store(root).history())
    assert "left by an interrupted" in do("action=clean", "confirm=true", "seed=7")
    assert stages(root) == {"corpus", "tokenizer", "tokens"}


def test_nothing_is_removed_while_a_run_holds_the_store(do: Do, root: Path) -> None:
    forget_reports(root)
    before = stages(root)
    with Store(root).lock(), pytest.raises(UserError, match="in use by"):
        do("action=clean", "confirm=true", "seed=7")
    assert stages(root) == before
