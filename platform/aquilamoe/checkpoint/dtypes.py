"""Numbers as the elements of a checkpoint: casts to its type, with torch or without, refused where one does not fit."""

from typing import TYPE_CHECKING, Any

import numpy as np

from aquilamoe.checkpoint.finite import first_nonfinite
from aquilamoe.checkpoint.safetensors_header import DTYPE_NAMES
from aquilamoe.config.messages import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LARGEST = {"F64": 1.7976931348623157e308, "F32": 3.4028234663852886e38, "F16": 65504.0, "BF16": 3.3895313892515355e38}
_PLAIN = {"F64": np.float64, "F32": np.float32, "F16": np.float16}  # of NumPy; it has no bfloat16


def torch_dtype(dtype: str) -> "torch.dtype":
    """The type of torch that safetensors spells so."""
    import torch

    found: torch.dtype = getattr(torch, DTYPE_NAMES[dtype])
    return found


def cast(block: "Tensor", dtype: "torch.dtype", name: str) -> "Tensor":
    """A block of a tensor in another type. UserError, naming the tensor, where a number is beyond float16."""
    import torch

    elements = block.to(dtype)
    if dtype == torch.float16 and block.dtype != dtype and not elements.isfinite().all():
        beyond = block[elements.isinf() & block.isfinite()]
        if len(beyond):
            raise _overflow(name, beyond[0].item())
    return elements


def encode(values: np.ndarray, dtype: str, name: str) -> np.ndarray:
    """Numbers that are in float32 or wider as elements of a type; those of BF16 as their bits. UserError as `cast`."""
    if dtype != "F64":
        values = np.ascontiguousarray(values, np.float32)  # on the way to fewer bits, as torch goes
    if dtype == "BF16":
        bits = values.view(np.uint32)
        nearest = bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))  # of two as near, the even one
        return (nearest >> 16).astype(np.uint16)
    with np.errstate(over="ignore"):
        elements: np.ndarray[Any, np.dtype[Any]] = np.ascontiguousarray(values, _PLAIN[dtype])
    beyond = values[np.isinf(elements) & np.isfinite(values)]
    if beyond.size:
        raise _overflow(name, float(beyond[0]))
    return elements


def check_finite(elements: "Tensor", block: "Tensor", name: str) -> None:
    """Refuse, by UserError, elements that are infinite or no numbers; `block` is what they were cast from."""
    index = first_nonfinite(elements)
    if index is not None:
        raise _not_finite(name, block.flatten()[index].item(), str(elements.dtype).removeprefix("torch."))


def check_representable(values: np.ndarray, dtype: str, name: str) -> None:
    """Refuse, by UserError, numbers that a type cannot hold, or that are none."""
    is_inside = np.abs(values) <= LARGEST[dtype]
    if not is_inside.all():
        raise _not_finite(name, float(values[~is_inside][0]), DTYPE_NAMES[dtype])


def _not_finite(name: str, value: float, dtype: str) -> UserError:
    return UserError(
        f"tensor '{name}': one of its weights becomes {value:.6g}, which is no number of {dtype}; choose a smaller "
        "noise, router_std or initializer_range, or a source with smaller weights"
    )


def _overflow(name: str, value: float) -> UserError:
    return UserError(
        f"tensor '{name}': one of its weights becomes {value:.6g}, float16 ends at 65504; use a checkpoint in bfloat16 "
        "or float32"
    )
