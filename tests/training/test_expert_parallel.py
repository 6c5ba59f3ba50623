"""Experts spread over processes: the gradient and the losses of one process, and in each a part of the experts."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from aquilamoe.checkpoint.dtensor import gather, own_part
from aquilamoe.config.messages import UserError
from aquilamoe.config.network import ModelConfig
from aquilamoe.config.schema import ClusterConfig, OptimizerConfig
from aquilamoe.model.transformer import Decoder, MixtureOfExperts
from aquilamoe.training import checkpoint, expert_parallel, optimizer
from aquilamoe.training.job import Rank
from aquilamoe.training.objective import z_loss
from aquilamoe.training.parallel import ParallelContext, initialize

pytestmark = pytest.mark.process

WORLD, ROWS, LENGTH, STEPS = 4, 8, 12, 5
LAYOUTS: dict[str, dict[str, Any]] = {
    "fsdp, 2": {"parallel": "fsdp", "expert_parallel": 2},
    "fsdp, 4": {"parallel": "fsdp", "expert_parallel": 4},
    "hsdp, 2": {"parallel": "hsdp", "shard_size": 2, "expert_parallel": 2},
}
SAVED = "fsdp, 2"  # the layout that leaves a checkpoint
ADAMW = {
    "name": "adamw",
    "betas": (0.9, 0.95),
    "momentum": 0.95,
    "eps": 1e-8,
    "weight_decay": 0.1,
    "max_grad_norm": 1.0,
}

Network = Callable[..., ModelConfig]


def build(group: ParallelContext, config: ModelConfig, dtype: torch.dtype, skewed: bool = False) -> Decoder:
    """This process's part of a model; `skewed` routers send every token to the last two experts."""
    torch.set_default_dtype(dtype)
    model = group.build(config, "fp32")
    torch.set_default_dtype(torch.float32)
    initialize(model, 3)
    if skewed:
        for layer in model.model.layers:
            assert isinstance(layer.mlp, MixtureOfExperts)
            layer.mlp.selection_bias_e = torch.arange(config.num_experts, dtype=dtype) * 10
    return model


def learn(group: ParallelContext, model: Decoder, network: torch.nn.Module, step: int) -> float:
    """Leave the gradient of the global batch in the parameters; return its loss, z-loss included."""
    draw = torch.Generator().manual_seed(step)
    rows = torch.randint(model.config.vocab_size, (ROWS, LENGTH + 1), generator=draw)
    mine_bt = rows.chunk(group.world_size)[group.rank]
    loss, routings = network(mine_bt[:, :-1], mine_bt[:, 1:])
    loss = loss + 0.1 * sum(z_loss(routing) for routing in routings)
    loss.backward()
    return group.sum_(loss.detach().double()).item() / group.world_size


def gradient(group: ParallelContext, config: ModelConfig, skewed: bool) -> dict[str, Tensor]:
    """Of one step in float64, whole, by name, and the norm that clipping sees."""
    model = build(group, config, torch.float64, skewed)
    learn(group, model, group.distribute(model), 0)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    found = {name: gather(each).clone() for name, each in gradients.items() if each is not None}
    assert found.keys() == gradients.keys()
    return found | {"norm": group.clip(model, 1.0)}


def losses(group: ParallelContext, config: ModelConfig, save_to: Path | None = None) -> list[float]:
    """Of STEPS steps in float32."""
    model = build(group, config, torch.float32)
    network, adamw = group.distribute(model), optimizer.build(model, OptimizerConfig.model_validate(ADAMW), 0.01)
    found = []
    for step in range(STEPS):
        found.append(learn(group, model, network, step))
        group.clip(model, 1.0)
        adamw.step()
        adamw.zero_grad()
    if save_to:
        checkpoint.save(save_to, model, adamw, STEPS, group=group)
    return found


def misplaced(group: ParallelContext, config: ModelConfig) -> list[str]:
    """Parameters whose part is not that of the whole model from the same seed."""
    model, whole = build(group, config, torch.float32), Decoder(config)
    whole.initialize(3)
    parts = {name: own_part(model.get_parameter(name)) for name, _ in whole.named_parameters()}
    return [name for name, p in whole.named_parameters() if not torch.equal(parts[name][0], p[parts[name][1]])]


def numbers_held(group: ParallelContext, config: ModelConfig) -> int:
    """Of experts, in this process."""
    parameters = group.build(config, "fp32").named_parameters()
    return sum(own_part(parameter)[0].numel() for name, parameter in parameters if ".experts." in name)


def work(rank: int, folder: Path) -> None:
    """Be one of the processes: try every layout, and leave what it gives in the folder."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), WORLD), rank=rank, world_size=WORLD)
    order = json.loads((folder / "order.json").read_text())
    config = ModelConfig.model_validate(order["model"])
    for name, changes in LAYOUTS.items():
        out = folder / name
        out.mkdir(exist_ok=True)
        group = ParallelContext(ClusterConfig.model_validate(order["cluster"] | changes), Rank(rank, WORLD, rank))
        found = {
            "losses": losses(group, config, out if name == SAVED else None),
            "misplaced": misplaced(group, config),
            "held": numbers_held(group, config),
        }
        (out / f"{rank}.json").write_text(json.dumps(found))
        for skewed in (False, True):
            tensors = gradient(group, config, skewed)
            if rank == 0:
                save_file(tensors, out / f"skewed-{skewed}.safetensors")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def config(network: Network) -> ModelConfig:
    return network("qwen2_moe shared", mlp_only_layers=(), num_hidden_layers=2)


@pytest.fixture(scope="module")
def cluster(compose: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return compose("cluster=local_process")["cluster"] | {"workers": WORLD, "cpus_per_worker": 1}


@pytest.fixture(scope="module")
def folder(config: ModelConfig, cluster: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What four processes leave: one process group for all layouts."""
    found = tmp_path_factory.mktemp("world")
    (found / "order.json").write_text(json.dumps({"model": config.model_dump(), "cluster": cluster}))
    command = [sys.executable, "-W", "ignore", __file__]
    processes = [subprocess.Popen([*command, str(rank), str(found)]) for rank in range(WORLD)]
    try:
        assert [process.wait() for process in processes] == [0] * WORLD
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return found


@pytest.fixture(scope="module")
def alone(cluster: dict[str, Any]) -> ParallelContext:
    return ParallelContext(ClusterConfig.model_validate(cluster | {"workers": 1}))


@pytest.fixture(scope="module")
def saved_alone(
    alone: ParallelContext, config: ModelConfig, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[float]]:
    """What one process saves, and its losses."""
    out = tmp_path_factory.mktemp("alone")
    return out, losses(alone, config, out)


def results_of(folder: Path, layout: str) -> list[dict[str, Any]]:
    return [json.loads((folder / layout / f"{rank}.json").read_text()) for rank in range(WORLD)]


@pytest.mark.parametrize("skewed", [False, True], ids=["spread", "all rows to one process"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_and_their_norm_are_those_of_one_process(
    layout: str, skewed: bool, folder: Path, config: ModelConfig, alone: ParallelContext
) -> None:
    one, many = gradient(alone, config, skewed), load_file(folder / layout / f"skewed-{skewed}.safetensors")
    assert one.keys() == many.keys()
    for name in one:
        assert one[name].any(), name
        torch.testing.assert_close(many[name], one[name], rtol=1e-9, atol=1e-12)
    idle = one["model.layers.0.mlp.experts.gate_proj"].flatten(1).any(dim=1).logical_not()
    assert idle.tolist() == ([True, True, False, False] if skewed else [False] * 4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_are_those_of_one_process(layout: str, folder: Path, saved_alone: tuple[Path, list[float]]) -> None:
    _, expected = saved_alone
    assert expected[-1] < expected[0]
    for result in results_of(folder, layout):
        assert result["losses"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_process_holds_its_share_of_the_experts_with_the_values_of_the_whole(
    layout: str, folder: Path, config: ModelConfig
) -> None:
    experts = 2 * 4 * 3 * config.hidden_size * config.moe_intermediate_size
    share = experts // (2 if layout == "hsdp, 2" else 4)
    for result in results_of(folder, layout):
        assert result["held"] == share
        assert result["misplaced"] == []


def test_what_many_processes_saved_is_what_one_would_have(folder: Path, saved_alone: tuple[Path, list[float]]) -> None:
    out, _ = saved_alone
    for file in ("model/model.safetensors", "training/optimizer.safetensors"):
        one, many = load_file(out / file), load_file(folder / SAVED / file)
        assert one.keys() == many.keys()
        for name in one:
            torch.testing.assert_close(many[name], one[name], rtol=0, atol=1e-4)


def test_experts_that_cannot_be_divided_are_refused_in_one_line(network: Network) -> None:
    for config, line in (
        (network("llama"), "cluster.expert_parallel: 2 workers are to share experts, and the model is dense; set"),
        (network("mixtral", num_experts=5), "cluster.expert_parallel: 5 experts are no multiple of 2 workers; choose"),
    ):
        with pytest.raises(UserError) as raised:
            expert_parallel.check(config, 2)
        assert str(raised.value).startswith(line) and "\n" not in str(raised.value)
        expert_parallel.check(config, 1)


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))
