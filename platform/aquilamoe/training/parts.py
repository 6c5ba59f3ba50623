"""New and old parts of a model that was grown, which train at rates of their own (SPARKLING, LLaMA-Pro).

A parameter that is new as a whole, or old, is in an optimizer's group of its own. Of one that is both, the optimizer
updates all of it by one rate, and what has another rate is then moved by its share of that update: with weight decay
and moments as they are, each weight moves as under its own rate. Frozen weights keep their bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from aquilamoe.checkpoint.dtensor import own_part
from aquilamoe.config.messages import UserError
from aquilamoe.config.steps import GroupsConfig
from aquilamoe.model.marks import Marks
from aquilamoe.training.optimizer import AnyOptimizer
from aquilamoe.training.parallel import ParallelContext

Part = Literal["new", "old", "mixed"]


@dataclass(frozen=True)
class RatesByPart:
    """Learning rates of a step: of the new parts and of the old ones."""

    new: float
    old: float

    @property
    def by_part(self) -> dict[str, float]:
        """The rates by which the optimizer updates parameters; of those that are both, the one that is not zero."""
        return {"new": self.new, "old": self.old, "mixed": self.old or self.new}

    @property
    def measured(self) -> dict[str, float]:
        """As values of a step."""
        return {"train/learning_rate_new": self.new, "train/learning_rate_old": self.old}


class Parts:
    """The new and the old weights of a model.

    Building it freezes parameters that have no weight that trains: they need no gradient and no moments.
    """

    def __init__(self, model: nn.Module, marks: Mapping[str, Marks], groups: GroupsConfig) -> None:
        """marks: of every parameter, by name.

        Raises:
            UserError: no weight would train.
        """
        self.groups = groups
        self.marks = marks
        self.part_of = {name: _part(self.marks[name]) for name, _ in model.named_parameters()}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(bool(self._ratio(self.part_of[name])))
        self.parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
        if not self.parameters:
            kind = "new" if groups.old.learning_rate_ratio == 0 else "old"
            raise UserError(f"optimizer.groups: no weight is {kind}, and all others are frozen; raise their ratio")

    def _ratio(self, part: Part) -> float:
        """Zero where the part is frozen."""
        new, old = self.groups.new.learning_rate_ratio, self.groups.old.learning_rate_ratio
        return {"new": new, "old": old, "mixed": new + old}[part]

    def rates(self, learning_rate: float, tokens: int) -> RatesByPart:
        """Learning rates where that of the stage is this, after so many tokens of the stage."""
        new = self.groups.new.ratio_after(tokens) if self.groups.new.learning_rate_ratio else 0.0
        return RatesByPart(new * learning_rate, self.groups.old.learning_rate_ratio * learning_rate)

    def of_mixed(self) -> list[tuple[Tensor, Tensor]]:
        """What this process has of the parameters that are both: the weights, and which of them are new."""
        mixed = [(name, each) for name, each in self.parameters.items() if self.part_of[name] == "mixed"]
        return [(part, self._is_new(name, place, part)) for name, each in mixed for part, place in [own_part(each)]]

    def _is_new(self, name: str, place: tuple[slice, ...], part: Tensor) -> Tensor:
        return self.marks[name].part(place).to(part.device)

    @torch.no_grad()
    def drop_frozen_gradients(self) -> None:
        """Before gradients are clipped: those of frozen weights are no part of their norm."""
        if not self.groups.freezes:
            return
        for name, parameter in self.parameters.items():
            if self.part_of[name] == "mixed" and parameter.grad is not None:
                gradient, place = own_part(parameter.grad)
                is_new = self._is_new(name, place, gradient)
                gradient.masked_fill_(is_new if not self.groups.new.learning_rate_ratio else ~is_new, 0)

    @torch.no_grad()
    def norms(self, group: ParallelContext) -> dict[str, Tensor]:
        """L2 norms of the gradients of new and of old weights, on all processes, 0-dim."""
        device = group.device
        squares = torch.zeros(2, dtype=torch.float64, device=device)
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            gradient, place = own_part(parameter.grad)
            of_new = gradient.masked_fill(~self._is_new(name, place, gradient), 0).double().square().sum()
            squares += torch.stack([of_new, gradient.double().square().sum() - of_new])
        if group.is_sharded:
            squares = group.sum_(squares) * group.shard_size / group.world_size
        new, old = squares.clamp(min=0).sqrt().unbind()
        return {"train/grad_norm_new": new, "train/grad_norm_old": old}

    def update(self, optimizer: AnyOptimizer, rates: RatesByPart) -> None:
        """Take an optimizer step of `set_learning_rate`'s rates, in which each weight moves at its own."""
        mixed = self.of_mixed() if rates.new != rates.old else []
        before = [part.detach().clone() for part, _ in mixed]
        optimizer.step()
        with torch.no_grad():
            for (part, is_new), kept in zip(mixed, before, strict=True):
                by, other = (rates.old, rates.new) if rates.old else (rates.new, rates.old)
                moved = kept + (part - kept) * (other / by) if other else kept
                part.copy_(torch.where(is_new == bool(rates.old), moved, part))


def _part(marks: Marks) -> Part:
    if marks.all_new:
        return "new"
    return "mixed" if marks.any_new else "old"
