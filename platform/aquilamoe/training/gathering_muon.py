"""Muon for matrices that are cut among processes."""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Muon

# Torch has no other door to its iteration, and a copy of it could become another.
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz

from aquilamoe.checkpoint.dtensor import gather, own_part


class GatheringMuon(Muon):
    """Gathers each matrix for the moment in which it is orthogonalised, and keeps momentum cut.

    The numbers are those of torch's Muon on whole matrices. Every process orthogonalises all matrices that are cut; a
    whole one in the memory of one process is that process's own work.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                momentum = group["momentum"]
                buffer = self.state[matrix].setdefault("momentum_buffer", torch.zeros_like(matrix.grad))
                buffer.lerp_(matrix.grad, 1 - momentum)
                update = gather(matrix.grad.lerp(buffer, momentum) if group["nesterov"] else buffer)
                update = _zeropower_via_newtonschulz(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
                part, place = own_part(matrix)
                part.mul_(1 - group["lr"] * group["weight_decay"])
                part.add_(update[place], alpha=-_adjust_lr(group["lr"], group["adjust_lr_fn"], matrix.shape))
