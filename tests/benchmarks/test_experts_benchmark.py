"""The benchmark of experts: all its ways compute the same layer, and the dense one has its FLOPs."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("experts_benchmark", ROOT / "benchmarks/experts.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for their annotations
    spec.loader.exec_module(module)
    vars(module)["LAYERS"] = 1
    return module


def test_all_ways_compute_the_same_layer(benchmark: ModuleType) -> None:
    ways = benchmark.layers(benchmark.Shape(32, 24, 4, 2), "cpu")
    x_btd, outputs = torch.randn(2, 16, 32), {}
    for name in ("loop", "grouped", "one by one"):
        ways[name].load_state_dict(ways["loop"].state_dict())
        outputs[name] = ways[name](x_btd)[0]
    for name, out in outputs.items():
        torch.testing.assert_close(out, outputs["loop"], msg=name)


def test_the_dense_model_has_the_active_size_of_the_sparse_one(benchmark: ModuleType) -> None:
    for shape in benchmark.SHAPES["cpu"]:
        sparse, dense = shape.config(sparse=True), shape.config(sparse=False)
        routers = benchmark.LAYERS * shape.hidden * shape.experts
        assert sparse.num_active_params - routers == dense.num_params


def test_layers_and_models_take_turns(benchmark: ModuleType) -> None:
    shape = benchmark.Shape(32, 24, 4, 2, tokens=256)
    assert benchmark.layer_costs(shape, "cpu", rounds=1).keys() == {"dense", "loop", "grouped", "one by one"}
    assert all(seconds > 0 for seconds in benchmark.model_costs(shape, "cpu", rounds=1).values())
