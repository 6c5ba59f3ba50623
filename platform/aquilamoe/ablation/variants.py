"""From axes to variants: every combination of their values, and every variant's experiment."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aquilamoe.config.ablation import AblationConfig
from aquilamoe.config.messages import UserError

Values = dict[str, Any]
# Compose the experiment with further overrides, once for each seed.
Compose = Callable[[Sequence[str], Sequence[int]], Sequence[Values]]


@dataclass(frozen=True)
class Variant:
    """A combination of the axes' values.

    values: the name of each axis' value. overrides: what they change, in the order of the axes.
    """

    values: Mapping[str, str]
    overrides: tuple[str, ...]

    @property
    def name(self) -> str:
        return ", ".join(self.values.values())


def variants(config: AblationConfig) -> Iterator[Variant]:
    """All combinations that are not excluded, the first axis slowest."""
    for names in _combinations(config):
        chosen = dict(zip(config.axes, names, strict=True))
        if config.leaves_out(chosen):
            continue
        overrides = [word for axis, name in chosen.items() for word in config.axes[axis].values[name]]
        yield Variant(chosen, tuple(overrides))


def _combinations(config: AblationConfig) -> Iterator[tuple[str, ...]]:
    """The values' names of all axes, together, in the order of the axes and of their values."""
    if config.combinations == "all":
        yield from itertools.product(*(axis.values for axis in config.axes.values()))
        return
    places = [{name: place for place, name in enumerate(axis.values)} for axis in config.axes.values()]
    middle = tuple(axis.baseline for axis in config.axes.values())
    found = {
        (*middle[:index], name, *middle[index + 1 :])
        for index, axis in enumerate(config.axes.values())
        for name in axis.values
    }
    yield from sorted(found, key=lambda names: [place[name] for place, name in zip(places, names, strict=True)])


def baseline(config: AblationConfig) -> Variant:
    """The variant that all others are compared with."""
    values = {axis: spec.baseline for axis, spec in config.axes.items()}
    return next(variant for variant in variants(config) if variant.values == values)


def check_differences(config: AblationConfig, fingerprints: Mapping[str, tuple[str, ...]]) -> None:
    """Refuse variants that compute the same; `fingerprints` are those of each variant's objective, by seed.

    UserError names the axis if it changes nothing at all, or else the two variants.
    """
    for axis, spec in config.axes.items():
        others = [other for other in config.axes if other != axis]
        groups: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
        for variant in variants(config):
            shared = tuple(variant.values[other] for other in others)
            groups.setdefault(shared, []).append(fingerprints[variant.name])
        compared = [found for found in groups.values() if len(found) > 1]
        if compared and all(len(set(found)) == 1 for found in compared):
            raise UserError(
                f"ablation.axes.{axis}: none of its values ({', '.join(spec.values)}) changes what "
                f"'{config.objective.stage}' computes; vary a key that this stage, or one before it, reads"
            )
    first: dict[tuple[str, ...], str] = {}
    for name, found in fingerprints.items():
        other = first.setdefault(found, name)
        if other != name:
            raise UserError(f"ablation.axes: '{other}' and '{name}' compute the same; remove or change one of them")
