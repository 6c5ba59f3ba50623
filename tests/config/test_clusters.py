"""The cluster files hold only what differs from the one that has every key."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from aquilamoe.cli import hydra_cli
from aquilamoe.cli.program import PIPELINE
from aquilamoe.config.cluster import ClusterConfig

FOLDER = Path(__file__).resolve().parents[2] / "conf" / "cluster"
OTHERS = sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem != "local")
Compose = Callable[..., dict[str, Any]]


def written(name: str) -> dict[str, Any]:
    """What a file has itself."""
    values: dict[str, Any] = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    return values


def test_the_local_cluster_has_every_key() -> None:
    assert written("local").keys() == ClusterConfig.model_fields.keys()


@pytest.mark.parametrize("name", OTHERS)
def test_a_cluster_begins_as_the_local_one_and_repeats_nothing_of_it(compose: Compose, name: str) -> None:
    own, local, composed = written(name), written("local"), compose(f"cluster={name}")["cluster"]
    assert own.pop("defaults") == ["local", "_self_"]
    from_environment = {key for key, value in own.items() if "${oc.env:" in str(value)}
    assert [key for key in own.keys() - from_environment if composed[key] == local[key]] == []
    assert {key: composed[key] for key in local.keys() - own.keys()} == {
        key: local[key] for key in local.keys() - own.keys()
    }


def test_a_cluster_of_the_working_folder_begins_as_the_local_one_too(
    compose: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "conf" / "cluster"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("# Mine.\ndefaults: [local, _self_]\nworkers: 3\n")
    monkeypatch.chdir(tmp_path)
    (values,) = hydra_cli.composed(PIPELINE, ["cluster=mine", "experiment=demo_text"])
    assert values["cluster"] == {**compose()["cluster"], "workers": 3}
