"""The random numbers of growth: a stream for every name, equal on all machines, and drawn without torch.

A stream is the bits of NumPy's SFC64, which NumPy promises to keep. Of them 16 name a quantile of the normal
distribution, of 65,536 that are as likely as each other: mean 0, variance 1, no number beyond 4.4. That takes a
third of the time of exact normal numbers, most of which is bits, too.
"""

import hashlib
from functools import cache
from statistics import NormalDist
from typing import Any

import numpy as np

Stream = np.random.SFC64
QUANTILES = 2**16


def stream(seed: int, name: str) -> Stream:
    """Random bits of one name: the same for a seed in whatever order tensors are streamed."""
    return np.random.SFC64(int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest(), "big"))


def normal(shape: tuple[int, ...], random: Stream, dtype: Any = np.float32) -> np.ndarray:
    """Standard normal numbers, float32 or float64."""
    return fill(np.empty(shape, dtype), random)


def fill(values: np.ndarray, random: Stream) -> np.ndarray:
    """Make the elements of a contiguous array, float32 or float64, standard normal numbers; return it."""
    words = random.random_raw(-(-values.size // 4)).astype("<u8", copy=False).view("<u2")
    # All words are in bounds; wrapping what never happens is quicker than checking for it.
    _quantiles(values.dtype).take(words[: values.size], out=values.reshape(-1), mode="wrap")
    return values


def permutation(size: int, random: Stream) -> np.ndarray:
    """The numbers below `size` in a random order, int64."""
    return random.random_raw(size).argsort(kind="stable")


def orthogonal(rows: int, columns: int, random: Stream) -> np.ndarray:
    """Rows at right angles to each other, as long as normal ones are on average; columns, where there are more rows.

    float64. Uniform among all such matrices (Mezzadri, arXiv math-ph/0609050).
    """
    tall = normal((max(rows, columns), min(rows, columns)), random, np.float64)
    q, r = np.linalg.qr(tall)
    q *= np.sign(np.diag(r)) * max(rows, columns) ** 0.5
    return q if rows > columns else np.ascontiguousarray(q.T)


@cache
def _quantiles(dtype: np.dtype) -> np.ndarray:
    """In the middle of equal parts of the distribution, scaled to a variance of 1."""
    quantile = NormalDist().inv_cdf
    upper = np.array([quantile(0.5 + (number + 0.5) / QUANTILES) for number in range(QUANTILES // 2)])
    upper /= np.sqrt(np.square(upper).mean())
    return np.concatenate([-upper[::-1], upper]).astype(dtype)
