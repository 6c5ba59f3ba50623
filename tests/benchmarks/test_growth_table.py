"""The table of docs/growth-exactness.md: for every method and option it has what the rules and a measurement give."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from aquilamoe.config import plugins
from aquilamoe.growth import rules

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def table() -> ModuleType:
    spec = importlib.util.spec_from_file_location("growth_table", ROOT / "benchmarks/growth_table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def committed(table: ModuleType) -> list[str]:
    return [line for line in table.PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]


def test_the_exactness_column_is_what_the_growth_will_claim(table: ModuleType) -> None:
    lines = committed(table)
    assert len(lines) == len(table.cases())
    for case, line in zip(table.cases(), lines, strict=True):
        title, sizes, exact, difference = (cell.strip() for cell in line.split("|")[1:5])
        assert title == f"`{case.title}`"
        assert [part.split()[0] for part in sizes.partition(" (source")[0].split(", ")] == list(case.sizes)
        rules.check(case.source, case.target, case.how)
        assert exact == ("yes" if rules.preserves(case.how, case.source, case.target) else "no"), line
        assert (float(difference) == 0) == (exact == "yes"), line


def test_every_growth_and_upcycling_that_has_a_yaml_is_in_the_table(table: ModuleType) -> None:
    shown = {case.yaml for case in table.cases()}
    files = {f"{group}/{path.stem}" for group in ("growth", "upcycling") for path in (ROOT / "conf" / group).iterdir()}
    assert shown == files
    assert {f"growth/{name}" for name in plugins.names("growth/methods")} <= shown


def test_a_measurement_gives_the_committed_lines_again(table: ModuleType, tmp_path: Path) -> None:
    lines = committed(table)
    for index, case in list(enumerate(table.cases()))[::6]:
        assert table.line(case, table.measure(case, table.source_of(case, tmp_path))) == lines[index]


@pytest.mark.process
def test_transformers_distinguishes_exact_growths_from_others_in_float32(table: ModuleType, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    tokens_bt = torch.arange(64).view(2, 32) * 37 % table.SOURCE.vocab_size

    @torch.no_grad()
    def logits(directory: Path) -> Tensor:
        return AutoModelForCausalLM.from_pretrained(directory).eval()(tokens_bt).logits[..., : table.SOURCE.vocab_size]

    wrong = {}
    for index, case in enumerate(table.cases()):
        source = table.source_of(case, tmp_path / "sources", torch.float32)
        before = logits(source)
        table.grow(case, source, tmp_path / str(index))
        difference = ((logits(tmp_path / str(index)) - before).abs().max() / before.abs().max()).item()
        claim = rules.preserves(case.how, case.source, case.target)
        if not (difference < 1e-5 if claim else difference > 1e-3):
            wrong[case.title, str(case.sizes)] = difference
    assert not wrong


def test_the_effective_rank_counts_directions_that_matter(table: ModuleType) -> None:
    assert table.effective_rank(torch.eye(5, dtype=torch.float64)) == pytest.approx(5)
    assert table.effective_rank(torch.ones(5, 5, dtype=torch.float64)) == pytest.approx(1)
    assert 1 < table.effective_rank(torch.diag(torch.tensor([1.0, 0.1], dtype=torch.float64))) < 2


def test_every_way_back_keeps_the_function_and_is_measured_again(table: ModuleType, tmp_path: Path) -> None:
    text = table.PAGE.read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("| grown by")]
    ways = table.ways_back()
    assert len(lines) == len(ways)
    for case, line in zip(ways, lines, strict=True):
        assert rules.preserves(case.how, case.source, case.target)
        assert line.split("|")[1].strip() == f"grown by `{case.title}`"
    for index in (2, 8):
        assert table.line_back(ways[index], table.source_of(ways[index], tmp_path)) == lines[index]
    assert {f"shrink={path.stem}" for path in (ROOT / "conf/shrink").iterdir()} <= {"shrink=exact"}
    assert table.page([], lines).endswith(text.partition("\n## The way back")[2])
