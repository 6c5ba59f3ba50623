"""Which layer of the source each layer of the target copies, by rule (METHODS section 3)."""

from collections.abc import Callable, Mapping


def interpolate(num_sources: int, num_targets: int) -> tuple[int, ...]:
    """Spread the layers evenly, copies beside their originals: layer l copies `l * num_sources // num_targets`.

    The arithmetic is on integers, because the float form rounds to the wrong layer for many pairs, e.g. 14 -> 18.
    """
    return tuple(layer * num_sources // num_targets for layer in range(num_targets))


def stack(num_sources: int, num_targets: int) -> tuple[int, ...]:
    """Put the whole stack on top of itself; a remainder repeats the bottom layers."""
    return tuple(layer % num_sources for layer in range(num_targets))


def stack_top(num_sources: int, num_targets: int) -> tuple[int, ...]:
    """Put the whole stack on top of itself; a remainder repeats the top layers, in their order."""
    remainder = num_targets % num_sources
    return (*stack(num_sources, num_targets - remainder), *range(num_sources - remainder, num_sources))


RULES: Mapping[str, Callable[[int, int], tuple[int, ...]]] = {
    "interpolate": interpolate,
    "stack": stack,
    "stack_top": stack_top,
}
