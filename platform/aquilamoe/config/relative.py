"""Sizes as multiples of the source's: `x2` doubles what the source has."""

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from aquilamoe.config.messages import UserError
from aquilamoe.config.network import ModelConfig

MULTIPLE = re.compile(r"x(?P<factor>\d{1,6}(\.\d{1,6})?)")


def absolute_sizes(source: ModelConfig, changes: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The sizes that change, in numbers; what is None stays the source's and is left out.

    Args:
        source: whose sizes the multiples are of.
        changes: sizes by field: numbers, or multiples such as `x2` and `x1.5`.
        where: begins messages.

    Raises:
        UserError: a multiple of what is no size, or one that is no whole number.
    """
    found = {field: value for field, value in changes.items() if value is not None}
    return {field: _absolute(source, field, value, where) for field, value in found.items()}


def _absolute(source: ModelConfig, field: str, value: Any, where: str) -> Any:
    multiple = MULTIPLE.fullmatch(value) if isinstance(value, str) else None
    if multiple is None:
        return value
    size = getattr(source, field, None)
    if type(size) is not int or size == 0:
        raise UserError(f"{where}.{field}: {value} of {size}, the source's, is no size; give it a number")
    product = size * Fraction(multiple["factor"])
    if product.denominator != 1:
        raise UserError(
            f"{where}.{field}: {value} of {size}, the source's, is {float(product):g}, no whole number; choose another "
            "multiple, or give it a number"
        )
    return int(product)
