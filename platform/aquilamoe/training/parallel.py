"""This process among those that train one model: its device, and all that they do together."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from aquilamoe.config.schema import ClusterConfig
from aquilamoe.model import Decoder
from aquilamoe.training.job import FIRST, Rank


class Group:
    """The processes of a stage, seen from one of them. Alone, every operation is what its name says of one process.

    cluster: how the model is laid out over them. rank: which of them this is.
    """

    def __init__(self, cluster: ClusterConfig, rank: Rank = FIRST) -> None:
        self.cluster, self.rank, self.world_size = cluster, rank.rank, rank.world_size
        self.device = torch.device("cuda", rank.local_rank) if cluster.gpus_per_worker else torch.device("cpu")

    @property
    def is_first(self) -> bool:
        """Whether this process writes what all have in common."""
        return self.rank == 0

    def distribute(self, model: Decoder) -> nn.Module:
        """The network to call in training; its parameters are the model's."""
        if self.cluster.compile:
            for layer in model.model.layers:
                layer.compile()
        return DistributedDataParallel(model) if self.world_size > 1 else model

    def exchange_gradients(self, network: nn.Module, now: bool) -> None:
        """Whether the next backward pass ends with gradients that are the mean over all processes."""
        if isinstance(network, DistributedDataParallel):
            network.require_backward_grad_sync = now

    def sum_(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def clip(self, model: nn.Module, max_norm: float) -> Tensor:
        """Scale the gradients of all parameters to an L2 norm of at most `max_norm`; return the norm before, 0-dim."""
        return torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world_size > 1:
            dist.barrier()
