"""Which weights of a grown model are new: further copies, padding and initialised ones (arXiv 2602.02472).

The first copy of a unit is old, wherever it is; the further ones are new, as are units from elsewhere, the further
copies of a layer and of an expert, and tensors without a counterpart in the source. A weight is new where its row or
its column is: one bit for each unit and axis, which growths after one another carry on. The marks follow from the
sizes and the seeds of the growths alone, so that no file has to keep them beside a checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from aquilamoe.config.growth import Growth
from aquilamoe.config.steps import GroupsConfig
from aquilamoe.growth.gradient_maps import Axis, GradientMap, gradient_maps, parameter_shapes
from aquilamoe.model.marks import Marks


def new_parts(growths: Sequence[Growth]) -> dict[str, Marks]:
    """The marks of every parameter of the model that the growths made, one after the other, by its name.

    growths: in the order in which they were done, at least one; each begins with the model that the one before left.
    """
    found = {name: Marks.alike(shape, False) for name, shape in parameter_shapes(growths[0].source).items()}
    for growth in growths:
        found = _after(found, growth)
    return found


def counted(growths: Sequence[Growth], groups: GroupsConfig) -> tuple[Growth, ...]:
    """The growths of a line of checkpoints whose parts are new to a stage that trains by these groups."""
    return tuple(each for each in growths if groups.growths == "all" or each.num_trainings == growths[-1].num_trainings)


def _after(before: Mapping[str, Marks], growth: Growth) -> dict[str, Marks]:
    shapes = parameter_shapes(growth.target)
    return {
        name: _mapped(name, before, maps) if maps else Marks.alike(shapes[name], True)
        for name, maps in gradient_maps(growth.source, growth.target, growth.how, growth.seed)
    }


def _mapped(name: str, before: Mapping[str, Marks], maps: Sequence[GradientMap]) -> Marks:
    """The marks of a parameter: those of what it copies, and what is new about it."""
    if len(maps) == 1 and maps[0].expert is None:
        return _carried(before[maps[0].name], maps[0], _Copied())
    # A neuron of an expert is new where an earlier expert has it of the same original.
    copied: dict[int | None, set[int]] = {}
    is_down = name.endswith("down_proj")
    experts = []
    for each in maps:
        marks, neurons = before[each.name], copied.setdefault(each.expert, set())
        if each.expert is not None:
            marks = Marks(marks.rows[each.expert], marks.columns[each.expert])
        experts.append(_carried(marks, each, _Copied(columns=neurons) if is_down else _Copied(rows=neurons)))
    return Marks(torch.stack([each.rows for each in experts]), torch.stack([each.columns for each in experts]))


@dataclass(frozen=True)
class _Copied:
    """Units of the source that have a copy already, by axis."""

    rows: set[int] = field(default_factory=set)
    columns: set[int] = field(default_factory=set)


def _carried(marks: Marks, gradient_map: GradientMap, copied: _Copied) -> Marks:
    rows = _along(marks.rows.squeeze(-1), gradient_map.rows, copied.rows)
    columns = _along(marks.columns.squeeze(-2), gradient_map.columns, copied.columns)
    if not gradient_map.known:  # a further copy of a layer
        rows = torch.ones_like(rows)
    return Marks(rows[..., None], columns[..., None, :])


def _along(old: Tensor, axis: Axis, copied: set[int]) -> Tensor:
    """Marks along one axis, by position in the target. copied: grows by what is copied here."""
    index = torch.arange(old.shape[-1]) if axis.index is None else axis.index
    further = []
    for source in index.tolist():
        further.append(source in copied)
        copied.add(source)
    found = old[..., index] | torch.tensor(further, dtype=torch.bool)
    if axis.unknown is not None:
        found = found | axis.unknown
    return torch.cat([found, found.new_ones((*found.shape[:-1], axis.padding))], dim=-1)
