"""The Python API, as a notebook uses it: growth, certificates and a store's records, silent and as plain objects."""

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import aquilamoe
from aquilamoe.cli import program
from aquilamoe.config.messages import UserError
from small_checkpoints import model, write_source

ROOT = Path(__file__).resolve().parent.parent
WIDER: dict[str, Any] = {"hidden_size": 12, "intermediate_size": 18}
TOKENS = {"tokens": 128, "sequence_length": 16}
IDS = torch.arange(24).view(2, 12) % 32


def logits(directory: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)(IDS).logits


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("api") / "source", model(), torch.float32)


def test_a_plan_states_what_a_growth_makes_and_writes_nothing(source: Path, tmp_path: Path) -> None:
    found = aquilamoe.plan_growth(source, tmp_path / "target", model=WIDER, growth="fpi")
    assert (found.model["hidden_size"], found.preserving) == (12, True)
    assert found.parameters == found.active_parameters == sum(torch.Size(t.shape).numel() for t in found.tensors)
    assert found.cost.written_bytes > 4 * found.parameters
    assert list(tmp_path.iterdir()) == []


def test_the_json_of_the_growth_tools_plan_has_the_same_facts(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"source={source}", f"target={tmp_path / 'target'}", "growth=fpi", "action=plan", "json=true"]
    sizes = [f"model.{field}={size}" for field, size in WIDER.items()]
    monkeypatch.setattr(sys, "argv", ["workflows/grow.py", *words, *sizes])
    program.grow()
    document = json.loads(capsys.readouterr().out)
    found = aquilamoe.plan_growth(source, tmp_path / "target", model=WIDER, growth="fpi")
    assert document["model"] == found.model
    assert document["parameters"] == found.parameters
    assert [tensor["tensor"] for tensor in document["tensors"]] == [line.tensor for line in found.tensors]
    monkeypatch.setattr(sys, "argv", ["workflows/grow.py", *words[:3], "json=true", *sizes])
    with pytest.raises(SystemExit, match=r"^error: json: action=run has no JSON document; action=plan has one$"):
        program.grow()


def test_growing_keeps_the_function_and_prints_nothing(
    source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    grown = aquilamoe.grow(source, tmp_path / "target", model=WIDER, growth="fpi", certificate=TOKENS)
    assert grown.certificate is not None
    assert grown.certificate["passed"] is True
    again = aquilamoe.grow(source, tmp_path / "target", model=WIDER, growth="fpi", certificate=TOKENS)
    assert again == grown
    assert aquilamoe.certify(source, grown.directory, **TOKENS)["passed"] is True
    assert tuple(capfd.readouterr()) == ("", "")
    torch.testing.assert_close(logits(grown.directory), logits(source), atol=1e-4, rtol=1e-4)


def test_a_method_takes_settings_and_an_upcycling_makes_experts(source: Path, tmp_path: Path) -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2}
    quiet = {"method": "noise", "noise": 0.25}
    made = aquilamoe.upcycle(source, tmp_path / "moe", model=experts, upcycling=quiet, certificate={"enabled": False})
    assert made.certificate is None
    assert made.record["recipe"]["config"]["upcycling"]["noise"] == 0.25
    config = json.loads((made.directory / "config.json").read_text())
    assert config["num_experts_per_tok"] == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda source, to: aquilamoe.grow(source, to, model=WIDER, growth="fip"), "growth: 'fip' is no method; did"),
        (lambda source, to: aquilamoe.grow(source, to, model={"hidden_sizes": 9}), "did you mean 'hidden_size'"),
        (lambda source, to: aquilamoe.plan_growth(source / "x", to, model=WIDER, growth="fpi"), "x: no such directory"),
        (lambda _, to: aquilamoe.Store(to).outputs(), "has no outputs"),
    ],
)
def test_what_a_caller_can_repair_is_one_line(source: Path, tmp_path: Path, call: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        call(source, tmp_path / "target")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_importing_the_package_imports_nothing_else_of_it() -> None:
    code = "import sys, aquilamoe; print(sorted(m for m in sys.modules if m.startswith(('aquilamoe', 'torch'))))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "['aquilamoe']\n"
    assert sorted(set(aquilamoe.__all__) - set(dir(aquilamoe.api))) == []
    with pytest.raises(AttributeError, match="has no attribute 'grown'"):
        _ = aquilamoe.grown


def test_the_cells_of_the_notebook_run_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = json.loads((ROOT / "examples" / "grow_a_checkpoint.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) >= 4
    assert [cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code"] == [[]] * len(cells)
    (tmp_path / "cells.py").write_text("\n\n".join(cells))
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path("cells.py")
    assert names["certificate"]["passed"] is True
    assert names["difference"] < 1e-4
