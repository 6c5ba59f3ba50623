"""Experts of a layer divided among processes; rows travel to their experts and back, all to all (GShard, arXiv
2006.16668).

Every process of the expert dimension trains on data of its own: it is a data-parallel process like any other, and only
what experts compute is computed elsewhere. No row is dropped, whatever the experts' load.

Shapes: as in `model.kernels.experts`; p processes of the expert dimension.
"""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from aquilamoe.config.messages import UserError
from aquilamoe.config.schema import ModelConfig
from aquilamoe.model.kernels.experts import expert_feed_forwards, gather_rows, sort_rows
from aquilamoe.model.transformer import Decoder, Experts, MixtureOfExperts


def check(config: ModelConfig, expert_parallel: int) -> None:
    """UserError if the experts of a model cannot be divided among so many processes."""
    if expert_parallel > 1 and not config.is_moe:
        raise UserError(
            f"cluster.expert_parallel: {expert_parallel} workers are to share experts, and the model is dense; set it "
            "to 1"
        )
    if expert_parallel > 1 and config.num_experts % expert_parallel:
        fits = [size for size in range(1, config.num_experts + 1) if config.num_experts % size == 0]
        raise UserError(
            f"cluster.expert_parallel: {config.num_experts} experts are no multiple of {expert_parallel} workers; "
            f"choose from {fits}"
        )


def distribute_experts(model: Decoder, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
    """Divide experts over the last dimension of a mesh, "expert", and cut each over the one before it, "cut".

    A dimension "replicate" before these has copies. To be called before FSDP2 takes the rest of a block: what it took
    it leaves alone. Gradients become the mean over all processes, as those of all other parameters.
    """
    names = mesh.mesh_dim_names
    assert names is not None and names[-2:] == ("cut", "expert")
    for experts in shard_experts(model, mesh["expert"]):
        place = partial(_cut_through, mesh["cut"].size())
        fully_shard(experts, mesh=mesh[names[:-1]], shard_placement_fn=place, mp_policy=policy)


def _cut_through(size: int, parameter: nn.Parameter) -> Shard:
    for dimension in (1, 2):
        if parameter.shape[dimension] % size == 0:
            return Shard(dimension)
    raise UserError(
        f"cluster.expert_parallel: {size} workers are to share an expert, and divide neither of its "
        f"{parameter.shape[1]} and {parameter.shape[2]} rows and columns; set a larger expert_parallel"
    )


def shard_experts(model: Decoder, mesh: DeviceMesh) -> list[Experts]:
    """Leave each process of a mesh of one dimension its own slice of every layer's experts; return the experts.

    The parameters become distributed tensors cut along the expert dimension: whatever knows these (FSDP2, checkpoints,
    optimizers) works as before. A model on the meta device, or with the same values on all processes, both do.
    A gradient is the mean over the processes of the mesh, as data parallelism has it. UserError as in `check`.
    """
    check(model.config, mesh.size())
    found = [layer.mlp.experts for layer in model.model.layers if isinstance(layer.mlp, MixtureOfExperts)]
    for experts in found:
        for name, parameter in list(experts.named_parameters()):
            own_exx = parameter.detach().chunk(mesh.size())[mesh.get_local_rank()].clone()
            whole = DTensor.from_local(own_exx, mesh, [Shard(0)], run_check=False)
            experts.register_parameter(name, nn.Parameter(whole))
        experts.forward = partial(_elsewhere, experts, mesh.get_group())  # type: ignore[method-assign]
    return found


@torch.compiler.disable  # how many rows go where is known only when the router has chosen
def _elsewhere(experts: Experts, group: dist.ProcessGroup, rows_sd: Tensor, counts_e: Tensor) -> Tensor:
    """`Experts.forward`, with the rows of this process computed wherever their experts are."""
    size = group.size()
    equal = [len(counts_e) // size] * size
    counts_pe = _exchange(counts_e, equal, equal, group).view(size, -1)
    given, taken = torch.stack((counts_e.view(size, -1).sum(dim=1), counts_pe.sum(dim=1))).tolist()
    mine_sd = _exchange(rows_sd, given, taken, group)  # by process, and of each by expert
    own = torch.arange(counts_pe.shape[1], device=rows_sd.device).repeat(size)
    expert_s = own.repeat_interleave(counts_pe.flatten(), output_size=sum(taken))
    order_s, place_s1 = sort_rows(expert_s[:, None])
    sorted_sd = gather_rows(mine_sd, order_s, place_s1)
    gate_efd, up_efd = _own(experts.gate_proj, size), _own(experts.up_proj, size)
    down_edf = _own(experts.down_proj, size)
    kernel = experts.kernels.experts_on(rows_sd.device.type)
    sorted_sd = expert_feed_forwards(sorted_sd, counts_pe.sum(dim=0), gate_efd, up_efd, down_edf, kernel=kernel)
    return _exchange(gather_rows(sorted_sd, place_s1[:, 0], order_s[:, None]), taken, given, group)


def _exchange(rows_sx: Tensor, sent: list[int], taken: list[int], group: dist.ProcessGroup) -> Tensor:
    """Give each process so many of the rows, in their order, and take so many from each. Gradients travel back."""
    return collectives.wait_tensor(collectives.all_to_all_single_autograd(rows_sx.contiguous(), taken, sent, group))


def _own(parameter: Tensor, size: int) -> Tensor:
    assert isinstance(parameter, DTensor)
    return _Mean.apply(parameter.to_local(), size)


class _Mean(torch.autograd.Function):
    """Nothing, but that the gradient, which is a sum over so many processes, becomes their mean."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int) -> Tensor:
        ctx.size = size
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient / ctx.size, None
