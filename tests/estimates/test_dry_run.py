"""A dry run checks every tensor of an experiment at full size, and runs its graph at a small one."""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from aquilamoe.checkpoint import tensor_names
from aquilamoe.cli import commands
from aquilamoe.config import graph
from aquilamoe.config.graph import Node
from aquilamoe.config.messages import UserError
from aquilamoe.estimates import dry_run_shapes
from aquilamoe.estimates.dry_run_graph import BATCH, NARROWEST, shrunk
from aquilamoe.growth import scale_up
from aquilamoe.growth.stream import Recipe

Compose = Callable[..., dict[str, Any]]
EXPERIMENTS = {"7b": 64, "1_8b": 64, "7b_mini": 4, "smoke": 4}


@pytest.fixture
def nodes(compose: Compose) -> Callable[..., dict[str, Node]]:
    return lambda *overrides: graph.build(graph.parse(compose(*overrides)))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_small_experiment_has_all_stages_and_layers_of_the_large_and_a_batch_for_each(
    compose: Compose, nodes: Callable[..., dict[str, Node]], tmp_path: Path, experiment: str
) -> None:
    large = nodes(f"+experiment={experiment}")
    values, width = shrunk(compose(f"+experiment={experiment}"), tmp_path)
    small = graph.build(graph.parse(values))
    assert width == EXPERIMENTS[experiment]
    assert list(small) == list(large)
    for name, node in small.items():
        assert node.tokens == (BATCH if large[name].tokens else 0)
        if node.model is not None and (other := large[name].model) is not None:
            assert node.model.num_hidden_layers == other.num_hidden_layers
            assert node.model.hidden_size * width == other.hidden_size >= NARROWEST * width
            groups = [m.num_attention_heads / m.num_key_value_heads for m in (node.model, other)]
            assert groups[0] == groups[1]
            assert node.model.num_experts == other.num_experts
    cluster = graph.parse(values).cluster
    assert (cluster.executor, cluster.workers, cluster.gpus_per_worker) == ("process", 1, 0)
    paths = [source.path for source in graph.parse(values).data.sources.values()]
    assert all(path is not None and Path(path).is_relative_to(tmp_path) for path in paths)


def test_the_models_of_the_paper_have_the_tensors_of_their_files(nodes: Callable[..., dict[str, Node]]) -> None:
    found = nodes("+experiment=7b")
    assert dry_run_shapes.check_model(found["prepare"]) == 32 * 12 + 3
    assert dry_run_shapes.check_model(found["moe"]) == 40 * 13 + 3


@pytest.mark.parametrize("words", [(), ("growth=lemon",), ("upcycling=drop",), ("growth=fpi", "upcycling=permute")])
def test_every_tensor_of_a_growth_is_made_once(nodes: Callable[..., dict[str, Node]], words: tuple[str, ...]) -> None:
    for name in ("scale_up", "scale_out"):
        node = nodes(*words)[name]
        assert node.model is not None
        assert dry_run_shapes.check_growth(node) == len(tensor_names.tensor_shapes(node.model))


def wrong(change: Callable[[Recipe], Iterator[Recipe]]) -> Callable[..., Iterator[Recipe]]:
    """A growth that makes something else of every recipe."""
    right = scale_up.recipes
    return lambda *arguments: (changed for recipe in right(*arguments) for changed in change(recipe))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda r: iter([] if tensor_names.HEAD in r.names else [r]), "lm_head.weight is not made"),
        (lambda r: iter([r, r] if tensor_names.HEAD in r.names else [r]), "lm_head.weight is made twice"),
        (
            lambda r: iter([replace(r, rows=replace(r.rows, shape=(1, *r.rows.shape[1:])))]),
            "model.embed_tokens.weight has shape (1, 128), the target's is (4096, 128)",
        ),
        (lambda r: iter([replace(r, names=["extra.weight"])]), "extra.weight is made and the target has none"),
    ],
)
def test_a_growth_that_makes_the_wrong_tensors_is_found(
    nodes: Callable[..., dict[str, Node]], monkeypatch: pytest.MonkeyPatch, change: Any, line: str
) -> None:
    monkeypatch.setattr(scale_up, "recipes", wrong(change))
    with pytest.raises(UserError) as caught:
        dry_run_shapes.check_growth(nodes()["scale_up"])
    assert str(caught.value).startswith(f"stages.scale_up: {line}")


def test_a_network_with_other_tensors_than_its_files_is_found(
    nodes: Callable[..., dict[str, Node]], monkeypatch: pytest.MonkeyPatch
) -> None:
    node = nodes()["prepare"]
    assert node.model is not None
    files = tensor_names.tensor_shapes(node.model)
    monkeypatch.setattr(tensor_names, "tensor_shapes", lambda _: files)
    more_heads = replace(node, model=node.model.model_copy(update={"num_attention_heads": 8}))
    with pytest.raises(UserError, match=r"stages\.prepare: model\.layers\.0\.self_attn\.q_proj\.weight has shape"):
        dry_run_shapes.check_model(more_heads)


def test_a_dry_run_goes_through_every_stage_and_leaves_nothing(
    compose: Compose, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    without = ("stages.control=null", "report.control=null", "stages.evaluate.inputs.control=null")
    words = ("+experiment=smoke", "action=dryrun", f"paths.root={tmp_path / 'runs'}", *without)
    commands.execute(compose(*words), "command")
    printed = capsys.readouterr().out
    assert "scale_out: 81 tensors, " in printed
    assert "The graph with widths divided by 4, a batch for every stage" in printed
    assert "All 10 stages ran" in printed
    assert list(tmp_path.glob("smoke-dryrun-*")) == []
    assert not (tmp_path / "runs").exists()
