"""Computing with bf16 parameters whose float32 originals the optimizer moves."""

import torch
from torch import Tensor

from aquilamoe.model.transformer import Decoder
from aquilamoe.training.parallel import ParallelContext


class Bf16Copy:
    """A bf16 copy of a model that computes in its place; the model itself keeps the float32 parameters.

    Optimizer, checkpoints and what is published see the model alone, so that nothing of the copy is state. Gradients
    come from the copy in bf16 and are summed, over micro-batches and over ranks, in float32.
    """

    def __init__(self, model: Decoder, group: ParallelContext) -> None:
        """model: a whole one, with its values. Sharded ones are rounded when gathered: see `ParallelContext.build`."""
        self.group = group
        self.network = group.build(model.config, "fp32").to(torch.bfloat16)
        self.originals: list[Tensor] = list(model.parameters())
        self.copies: list[Tensor] = list(self.network.parameters())
        for original, copy in zip(self.originals, self.copies, strict=True):
            copy.requires_grad_(original.requires_grad)
        self.round()

    @torch.no_grad()
    def round(self) -> None:
        """Take the parameters of the model, after each step."""
        torch._foreach_copy_(self.copies, self.originals)

    @torch.no_grad()
    def add_gradients(self) -> None:
        """Move the gradients of a backward pass to the model, adding to the gradients there."""
        for original, copy in zip(self.originals, self.copies, strict=True):
            if copy.grad is None:
                continue
            if original.grad is None:
                original.grad = copy.grad.float()
            else:
                original.grad += copy.grad
            copy.grad = None

    @torch.no_grad()
    def average_gradients(self) -> None:
        """Over all ranks, once a step."""
        if self.group.world_size > 1:
            for original in self.originals:
                if original.grad is not None:
                    self.group.sum_(original.grad).div_(self.group.world_size)
