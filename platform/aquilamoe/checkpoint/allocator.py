"""Keep large buffers in the process instead of giving them back to the kernel after every tensor (glibc only)."""

import ctypes
import sys

M_TRIM_THRESHOLD = -1
M_TOP_PAD = -2
M_MMAP_MAX = -4
GIBIBYTE = 1 << 30


def keep_large_buffers() -> bool:
    """Raise malloc's thresholds for this process; return whether the C library took them.

    Every activation of a training step, and every block of a growth, is mapped, zeroed page by page and unmapped
    otherwise, which costs a CPU a fifth to a third of its time on small models and up to a half when growing.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library, e.g. musl
        return False
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, GIBIBYTE), (M_TOP_PAD, GIBIBYTE // 16))
    return all(mallopt(parameter, value) for parameter, value in settings)
