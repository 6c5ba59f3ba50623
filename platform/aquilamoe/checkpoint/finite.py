"""Finding weights that are no numbers, at the speed of memory: a checkpoint that has some is damaged, or diverged."""

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

# The bits of the exponent; all set in infinities and in what is not a number, and in nothing else.
EXPONENTS: dict[str, np.uint16 | np.uint32 | np.uint64] = {
    "BF16": np.uint16(0x7F80),
    "F16": np.uint16(0x7C00),
    "F32": np.uint32(0x7F800000),
    "F64": np.uint64(0x7FF0000000000000),
}
PIECE = 2**17  # elements: what is computed in between stays in the processor's cache


def first_nonfinite_bytes(data: memoryview, dtype: str) -> int | None:
    """Index of the first element of raw bytes that is infinite or NaN; `dtype` as safetensors spells it."""
    mask = EXPONENTS[dtype]
    items: np.ndarray[tuple[int], np.dtype[Any]] = np.frombuffer(data, dtype=mask.dtype)
    for begin in range(0, len(items), PIECE):
        exponents = items[begin : begin + PIECE] & mask
        if exponents.max() == mask:
            return begin + int((exponents == mask).argmax())
    return None


def first_nonfinite(tensor: "Tensor") -> int | None:
    """Index of the first element, in the order of a flattened tensor, that is infinite or NaN."""
    if tensor.numel() == 0 or all(bound.isfinite() for bound in tensor.aminmax()):
        return None
    return int(tensor.isfinite().logical_not().flatten().nonzero()[0])
