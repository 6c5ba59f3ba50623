"""The most that a device can compute, of which model FLOPs are a share (MFU)."""

import time
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Dense FLOP/s in bf16 that the makers state, by a part of the device's name.
STATED_PEAKS = {"H100": 989.4e12, "H200": 989.4e12, "A100": 312e12}
ENOUGH_S = 0.03
SIZES = {"cpu": 1024, "cuda": 4096}


@cache
def peak_flops_per_s(device: "torch.device", precision: str) -> float:
    """Of this process's device with the threads that torch uses now: as stated, or else of a square matrix product.

    precision: of a stage; bf16 counts for all that compute in it. Measured once, for some hundredths of a second.
    """
    import torch

    if device.type == "cuda" and precision != "fp32":
        name = torch.cuda.get_device_name(device)
        for part, stated in STATED_PEAKS.items():
            if part in name:
                return stated
    return _measured(device, torch.float32 if precision == "fp32" else torch.bfloat16)


def _measured(device: "torch.device", dtype: "torch.dtype") -> float:
    import torch

    size = SIZES[device.type]
    best = float("inf")
    began = time.perf_counter()
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    (matrix @ matrix)[0, 0].item()  # the first compiles
    while best == float("inf") or time.perf_counter() - began < ENOUGH_S:
        started = time.perf_counter()
        (matrix @ matrix)[0, 0].item()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
