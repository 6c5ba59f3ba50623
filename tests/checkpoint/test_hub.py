"""Checkpoints of a hub, served on this machine: downloaded, grown, published, and what a network's absence prints."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import local_hub
import outside
from aquilamoe.checkpoint.hub import HubAddress
from aquilamoe.config.messages import UserError
from local_hub import LocalHub

WORKFLOWS = Path(__file__).parents[2] / "workflows"
Run = Callable[..., "subprocess.CompletedProcess[str]"]
GROWTH = ("growth=fpi", "model.intermediate_size=80", "certificate.tokens=128", "certificate.sequence_length=32")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    """A hub with one checkpoint, and files beside it that are no part of one."""
    folder = outside.write_checkpoint(tmp_path_factory.mktemp("hub") / "small")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\nA small model.\n")
    (folder / "pytorch_model.bin").write_bytes(b"no part of it")
    (folder / "original").mkdir()
    (folder / "original" / "consolidated.safetensors").write_bytes(b"neither")
    with local_hub.serving({"org/small": folder}) as served:
        yield served


@pytest.fixture
def run(hub: LocalHub, tmp_path: Path) -> Run:
    """A script of workflows/ in a process whose hub is the local one, with a cache of its own."""

    def started(script: str, *words: str, **changes: str) -> "subprocess.CompletedProcess[str]":
        environment = {
            **os.environ,
            **hub.environment,
            "HF_HOME": str(tmp_path / "cache"),
            "HF_TOKEN": "hf_x",
            **changes,
        }
        return subprocess.run(
            [sys.executable, str(WORKFLOWS / script), *words],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )

    return started


@pytest.mark.parametrize(
    ("text", "name", "revision"),
    [
        ("hf://org/name", "org/name", None),
        ("hf://o-1/n.2_b@v1.0", "o-1/n.2_b", "v1.0"),
        ("hf://o/n@pr/3", "o/n", "pr/3"),
    ],
)
def test_an_address_has_a_name_and_perhaps_a_revision(text: str, name: str, revision: str | None) -> None:
    assert HubAddress.parse("source", text) == HubAddress(name, revision)


@pytest.mark.parametrize(
    "text", ["hf://", "hf://name", "hf://a/b/c", "hf://a/b@", "hf://../b", "hf://a/b@-x", "hf://a/b c"]
)
def test_what_is_no_address_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(UserError, match="is no address of the hub; write hf://ORG/NAME"):
        HubAddress.parse("source", text)


@pytest.mark.process
def test_a_checkpoint_is_downloaded_grown_and_published_with_its_card(run: Run, hub: LocalHub, tmp_path: Path) -> None:
    completed = run("grow.py", "source=org/small", "target=grown", "push=me/grown", *GROWTH)
    assert completed.returncode == 0, completed.stderr
    assert "published" in completed.stdout
    cached = {path.name for path in (tmp_path / "cache").rglob("snapshots/*/*")}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "LICENSE"} <= cached
    assert cached.isdisjoint({"pytorch_model.bin", "consolidated.safetensors"})
    files, target = hub.published["me/grown"], tmp_path / "grown"
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json", "record.json"} <= set(files)
    assert all(data == (target / name).read_bytes() for name, data in files.items() if name != ".gitattributes")
    assert hub.created[-1]["visibility"] == "private"
    assert hub.tokens == {"Bearer hf_x"}
    assert "hf_x" not in completed.stdout + "".join(path.read_text() for path in target.glob("*.json"))


@pytest.mark.process
def test_without_a_network_the_command_to_run_is_printed(run: Run, tmp_path: Path) -> None:
    for words, changes in (
        (("source=org/small", "target=grown", *GROWTH), {"HF_HUB_OFFLINE": "1"}),
        (("source=hf://org/small@v2", "target=grown", "action=plan", *GROWTH), {}),
        (("source=org/missing", "target=grown", *GROWTH), {}),
    ):
        completed = run("grow.py", *words, **changes)
        assert completed.returncode == 1
        assert completed.stderr.count("\n") == 1
        assert "run `hf download org/" in completed.stderr
        assert not (tmp_path / "grown").exists()


@pytest.mark.process
def test_a_pipeline_downloads_its_checkpoint_when_it_runs_and_not_for_a_plan(run: Run, tmp_path: Path) -> None:
    corpus = outside.write_corpus(tmp_path)
    words = [
        *outside.words("hf://org/small@main", corpus, tmp_path / "runs"),
        "until=tokenizer",
        "tracking.enabled=false",
    ]
    refused = run("efficientscale.py", *words, "action=plan")
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert (
        "only action=run downloads it; where there is a network, run `hf download org/small --revision main"
        in refused.stderr
    )
    ran = run("efficientscale.py", *words)
    assert ran.returncode == 0, ran.stderr
    planned = json.loads(run("efficientscale.py", *words, "action=plan", "json=true").stdout)
    assert {stage["state"] for stage in planned["stages"]} == {"cached"}
