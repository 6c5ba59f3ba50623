"""This process among those that train one model: its device, its part of the model, and all that they do together.

Three layouts of `n` processes (PyTorch FSDP, arXiv 2304.11277), which give the same gradient, that of the mean over the
global batch: `ddp`, a copy of the model in each; `fsdp`, every tensor cut into n parts, gathered a block at a time;
`hsdp`, cut within groups of `shard_size` and copied among the groups. With experts spread over `expert_parallel`
processes, which are neighbours in a shard group, an expert is cut among the processes of the group that have it.
"""

from collections.abc import Sequence
from functools import cached_property, partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from aquilamoe.checkpoint.dtensor import own_part
from aquilamoe.config.messages import UserError
from aquilamoe.config.schema import ClusterConfig, ModelConfig
from aquilamoe.model.kernels.choice import Kernels
from aquilamoe.model.transformer import Decoder
from aquilamoe.training import expert_parallel
from aquilamoe.training.job import FIRST, Rank

MASTER_IN_FLOAT32 = "bf16_master"  # the precision that computes with rounded copies of the parameters


class ParallelContext:
    """The processes of a stage, seen from one of them. With one process, every operation is local.

    cluster: how the model is laid out over them. rank: which of them this is. UserError if they do not divide so.
    """

    def __init__(self, cluster: ClusterConfig, rank: Rank = FIRST) -> None:
        self.cluster = cluster
        self.rank = rank.rank
        self.world_size = rank.world_size
        self.device = torch.device("cuda", rank.local_rank) if cluster.gpus_per_worker else torch.device("cpu")
        self.kernels = Kernels(cluster.attention, cluster.experts)
        self.is_sharded = self.world_size > 1 and cluster.parallel != "ddp"
        self.shard_size = self.world_size if cluster.shard_size is None else cluster.shard_size
        if self.is_sharded:
            _check_division(self.world_size, self.shard_size, cluster.expert_parallel)

    @property
    def is_first(self) -> bool:
        """Whether this process writes what all have in common."""
        return self.rank == 0

    @cached_property
    def background(self) -> dist.ProcessGroup | None:
        """All processes once more: what runs beside training exchanges here, out of turn."""
        return dist.new_group(backend="gloo") if self.world_size > 1 else None

    def build(self, config: ModelConfig, precision: str) -> Decoder:
        """The model, or this process's part of it, without values (see `initialize`, `load_state`)."""
        with torch.device("meta"):
            model = Decoder(config)
        model.use(self.kernels)
        for layer in model.model.layers:
            if self.cluster.activation_checkpointing:
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
            if self.cluster.compile:
                layer.forward = torch.compile(layer.forward)
        if self.is_sharded:
            self._shard(model, precision)
        model.to_empty(device=self.device)
        if config.tie_word_embeddings:  # `to_empty` gives the two names a tensor each
            model.lm_head.weight = model.model.embed_tokens.weight
        return model

    def _shard(self, model: Decoder, precision: str) -> None:
        if self.device.type == "cuda":  # FSDP2 gathers on the current device
            torch.cuda.set_device(self.device)
        policy = MixedPrecisionPolicy()
        if precision == MASTER_IN_FLOAT32:
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        expert_parallel.check(model.config, self.cluster.expert_parallel)
        if self.cluster.expert_parallel > 1:
            expert_parallel.distribute_experts(model, self._expert_mesh, policy)
        shard = partial(fully_shard, mesh=self._mesh, shard_placement_fn=self._placement, mp_policy=policy)
        for layer in model.model.layers:
            shard(layer)
        shard(model)
        register_fsdp_forward_method(model, "route")

    @cached_property
    def _mesh(self) -> DeviceMesh:
        """The processes over which a tensor is cut; before them, if there are several, the groups that have copies."""
        replicas = self.world_size // self.shard_size
        shape = (replicas, self.shard_size) if self.cluster.parallel == "hsdp" else (self.shard_size,)
        return init_device_mesh(self.device.type, shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])

    @cached_property
    def _expert_mesh(self) -> DeviceMesh:
        """The same processes, a shard group divided into those that cut an expert and those that have other experts."""
        size = self.cluster.expert_parallel
        shape, names = (self.shard_size // size, size), ("cut", "expert")
        if self.cluster.parallel == "fsdp":
            return init_device_mesh(self.device.type, shape, mesh_dim_names=names)
        replicas = self.world_size // self.shard_size
        return init_device_mesh(self.device.type, (replicas, *shape), mesh_dim_names=("replicate", *names))

    def _placement(self, parameter: nn.Parameter) -> Shard | None:
        """Cut stacked experts between experts where these divide, else through each of them."""
        experts_divide = parameter.ndim < 3 or parameter.shape[0] % self.shard_size == 0
        return None if experts_divide or parameter.shape[1] % self.shard_size else Shard(1)

    def distribute(self, model: Decoder) -> nn.Module:
        """The network to call in training; its parameters are the model's."""
        return DistributedDataParallel(model) if self.world_size > 1 and not self.is_sharded else model

    def exchange_gradients(self, network: nn.Module, now: bool) -> None:
        """Whether the next backward pass ends with gradients that are the mean over all processes.

        Parts are summed within a shard group after every pass, because no process has room for whole gradients.
        """
        if isinstance(network, DistributedDataParallel):
            network.require_backward_grad_sync = now
        elif isinstance(network, FSDPModule):
            network.set_requires_all_reduce(now)

    def sum_(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any_of(self, flags: Sequence[bool]) -> list[bool]:
        """Of each, whether it is true in any of the processes."""
        if self.world_size == 1:
            return list(flags)
        return [bool(count) for count in self.sum_(torch.tensor(flags, dtype=torch.int32, device=self.device)).tolist()]

    def clip(self, model: nn.Module, max_norm: float) -> Tensor:
        """Scale the gradients of all parameters to an L2 norm of at most `max_norm`; return the norm before, 0-dim."""
        if not self.is_sharded:
            return torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        parts = [own_part(parameter.grad)[0] for parameter in model.parameters() if parameter.grad is not None]
        squares = torch.nn.utils.get_total_norm(parts).double().square()
        # Every tensor is cut once among the processes of a shard group, and each group has the same.
        norm = (self.sum_(squares) * self.shard_size / self.world_size).sqrt()
        torch._foreach_mul_(parts, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm.to(parts[0].dtype)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world_size > 1:
            dist.barrier()


def _check_division(world_size: int, shard_size: int, expert_parallel: int) -> None:
    if world_size % shard_size:
        raise UserError(
            f"cluster.shard_size: {world_size} workers are no multiple of a shard group of {shard_size}; choose a "
            f"divisor of {world_size}, or other workers"
        )
    if shard_size % expert_parallel:
        raise UserError(
            f"cluster.expert_parallel: {shard_size} workers of a shard group are no multiple of {expert_parallel}; "
            f"choose a divisor of {shard_size}"
        )


@torch.no_grad()
def initialize(model: Decoder, seed: int) -> None:
    """Give a model, or this process's part of it, the values of `Decoder.initialize`, a tensor at a time."""
    for name, values in model.initial_values(seed):
        part, place = own_part(model.get_parameter(name))
        part.copy_(values[place])
