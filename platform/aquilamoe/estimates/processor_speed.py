"""How fast the processors of this machine compute, measured in a moment and without torch."""

import time
from functools import cache

SIZE, ENOUGH_S = 1024, 0.1
SHARE = 0.85  # of that speed, in a training: the steps of `smoke` and `7b_mini` had 0.82 to 0.95 on two cores with AVX2


@cache
def core_flops_per_s() -> float:
    """Of float32 matrix products, for a second of one core; other processes hardly change it."""
    import numpy as np

    matrix = np.ones((SIZE, SIZE), np.float32)
    began = time.process_time()
    best = float("inf")
    np.matmul(matrix[:64, :64], matrix[:64, :64])  # the first starts threads
    while (started := time.process_time()) - began < ENOUGH_S or best == float("inf"):
        np.matmul(matrix, matrix)
        best = min(best, time.process_time() - started)
    return 2 * SIZE**3 / best


def work_per_s(cores: int) -> float:
    """What so many cores train in a second, as `estimates.work` counts it."""
    return SHARE * cores * core_flops_per_s()
