"""What weights show that no record does: how many directions a matrix has, and how much experts are alike.

Computed from the files of a checkpoint, and kept beside the results, so that it is done once.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

from aquilamoe.checkpoint import safetensors_header
from aquilamoe.checkpoint.safetensors_header import TensorInfo
from aquilamoe.config.points import is_number
from aquilamoe.files import write_atomically
from aquilamoe.pipeline.store import to_json

if TYPE_CHECKING:
    import numpy as np

# A checkpoint with more parameters than this is skipped: its singular values take minutes.
MOST_NUMBERS = 40_000_000
# The matrices of a layer that multiply its stream; in a Mixture of Experts, of each expert (Mixtral: w1, w2, w3).
MATRIX = re.compile(r"layers\.(\d+)\..*\.(?:[qkvo]_proj|gate_proj|up_proj|down_proj|w[123])\.weight$")
EXPERT = re.compile(r"layers\.(\d+)\..*experts\.(\d+)\.(.*)\.weight$")


def of_checkpoint(directory: Path, kept: Path) -> dict[str, float]:
    """`rank`, and `similarity` for a Mixture of Experts, of a checkpoint's matrices; nothing for a large one.

    directory: with its safetensors. kept: the file that has them after the first time.
    """
    if (known := kept_figures(kept)) is not None:
        return known
    tensors = safetensors_header.read(directory)
    matrices = {name: info for name, info in tensors.items() if MATRIX.search(name)}
    numbers = sum(math.prod(info.shape) for info in matrices.values())
    if numbers > MOST_NUMBERS or any(info.dtype != "F32" for info in matrices.values()):
        return {}
    ranks = [effective_rank(matrix) for _, matrix in _read(directory, matrices)]
    found = {"rank": math.fsum(ranks) / len(ranks)}
    experts = {name: info for name, info in matrices.items() if EXPERT.search(name)}
    if experts:
        found["similarity"] = _similarity(directory, experts)
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(kept, to_json(found, str(directory)))
    return found


def kept_figures(kept: Path) -> dict[str, float] | None:
    """What `of_checkpoint` computed before; None if it has not run, or the file is damaged."""
    try:
        found = json.loads(kept.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and all(map(is_number, found.values())) else None


def effective_rank(matrix: "np.ndarray") -> float:
    """How many directions a matrix (rows, columns) uses, of all it could: 1 when they are all used alike.

    The exponential of the entropy of its singular values' shares (Roy and Vetterli, 2007), over the smaller side.
    """
    import numpy as np

    values = np.linalg.svd(matrix, compute_uv=False)
    total = values.sum()
    if total == 0.0:
        return 0.0
    shares = values[values > 0] / total
    return float(np.exp(-(shares * np.log(shares)).sum()) / min(matrix.shape))


def mean_cosine(vectors: Mapping[int, "np.ndarray"]) -> float:
    """Mean cosine similarity of all pairs."""
    import numpy as np

    # Experts of zeros have no direction: their similarity counts as 0.
    unit = [vector / (np.linalg.norm(vector) or 1.0) for vector in vectors.values()]
    pairs = [float(one @ other) for one, other in combinations(unit, 2)]
    return math.fsum(pairs) / len(pairs)


def _similarity(directory: Path, experts: Mapping[str, TensorInfo]) -> float:
    """Of the experts of a layer, all their matrices in one vector; the mean over layers."""
    import numpy as np

    layers: dict[int, dict[int, dict[str, np.ndarray]]] = {}
    for name, matrix in _read(directory, experts):
        match = EXPERT.search(name)
        assert match
        layers.setdefault(int(match[1]), {}).setdefault(int(match[2]), {})[match[3]] = matrix.ravel()
    means = [
        mean_cosine({expert: np.concatenate([parts[key] for key in sorted(parts)]) for expert, parts in layer.items()})
        for layer in layers.values()
        if len(layer) > 1
    ]
    return math.fsum(means) / len(means) if means else 1.0


def _read(directory: Path, tensors: Mapping[str, TensorInfo]) -> "Iterator[tuple[str, np.ndarray]]":
    import numpy as np

    for name, info in tensors.items():
        values = np.fromfile(directory / info.file, np.float32, math.prod(info.shape), offset=info.start)
        yield name, values.reshape(info.shape).astype(np.float64)
