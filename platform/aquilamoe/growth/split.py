"""The signed split: more experts at the same top-k, nearly without changing what the network computes.

Copies of an expert are equal, and the rows of the router for its m copies are the original's plus `o_c`: for two,
`+ M u` and `- M u`. `growth.directions` has the criterion, and how directions are found.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import log2
from pathlib import Path

import torch
from torch import Tensor

from aquilamoe.checkpoint import tensor_names
from aquilamoe.config.schema import ModelConfig, UpcyclingConfig
from aquilamoe.growth import directions, rng
from aquilamoe.growth.bounds import MOST_IN_16_BITS
from aquilamoe.growth.directions import RouterInputs
from aquilamoe.growth.forward import Opened, StreamedDecoder, opened
from aquilamoe.growth.stream import Progress, silent


@dataclass(frozen=True)
class Split:
    """What is added to the rows of a router.

    offsets: by layer, (m, d) float64: of each copy of every expert.
    shifts: by layer, M.
    """

    offsets: Mapping[int, Tensor]
    shifts: Mapping[int, float]


@torch.no_grad()
def calibrate(
    source: Path,
    target: ModelConfig,
    upcycling: UpcyclingConfig,
    seed: int,
    tokens_bt: Tensor | None,
    *,
    progress: Progress = silent,
) -> Split:
    """Find the directions of every layer.

    Args:
        source: directory of the Mixture of Experts that gets more of them.
        target: its model, which sets the number of copies.
        upcycling: a split.
        seed: of directions that are drawn, and of the starts of searches.
        tokens_bt: int64 (sequences, length); None where `calibration_tokens` is 0, and nothing is computed.
        progress: called with the number of layers computed, and of all layers.

    Returns:
        The rows to add, for `scale_out`; they depend on the arguments alone.

    Raises:
        UserError: the source is damaged.
    """
    assert (tokens_bt is None) == (upcycling.calibration_tokens == 0)
    with opened(source) as (checkpoint,):
        search = _Search(checkpoint, target, upcycling, seed)
        decoder = StreamedDecoder(*checkpoint)
        found: dict[int, tuple[Tensor, float]] = {}
        x_btd = None if tokens_bt is None else decoder.embed(tokens_bt)
        for layer in range(target.num_hidden_layers):
            seen: list[Tensor] = []
            if x_btd is not None:
                x_btd, _ = decoder.run_layer(layer, x_btd, seen.append)
            if target.is_sparse(layer):
                found[layer] = search.layer(layer, seen[0]) if seen else search.blind(layer)
            progress(layer + 1, target.num_hidden_layers)
    return Split(
        {layer: offsets_md.double() for layer, (offsets_md, _) in found.items()},
        {layer: shift for layer, (_, shift) in found.items()},
    )


class _Search:
    """The directions of one checkpoint's routers."""

    def __init__(self, source: Opened, target: ModelConfig, upcycling: UpcyclingConfig, seed: int) -> None:
        self._weights, self._config = source.weights, source.config
        self._copies = target.num_experts // source.config.num_experts
        self._upcycling, self._seed = upcycling, seed
        self._in_16_bits = source.weights.file_dtype.itemsize < 4

    def layer(self, layer: int, x_nd: Tensor) -> tuple[Tensor, float]:
        """Rows for the copies (m, d), and M; `x_nd` is what the router reads."""
        inputs = RouterInputs(x_nd, self._read(layer, tensor_names.ROUTER), self._config.num_experts_per_tok)
        rows_md = self._unit_rows(inputs, self._random(layer))
        shift = self._upcycling.shift
        assert shift is not None
        if shift == "auto":
            others = inputs.parts(directions.SEARCHED)[1]
            shift = directions.needed(others.gap_n, directions.margin(others.x_nd @ rows_md.T))
            shift = max(directions.LEAST_SHIFT, min(shift, MOST_IN_16_BITS) if self._in_16_bits else shift)
        rows_md = shift * rows_md
        if self._upcycling.common_row:
            rows_md = rows_md - directions.common_row(inputs, rows_md)
        return rows_md, shift

    def _unit_rows(self, inputs: RouterInputs, random: rng.Stream) -> Tensor:
        """Rows for the copies at M = 1."""
        is_learned, bits = self._upcycling.direction == "learned", log2(self._copies)
        if bits.is_integer():
            u_jd = inputs.x_nd[:0]
            for _ in range(int(bits)):
                find = directions.learned if is_learned else directions.random_direction
                u_jd = torch.cat([u_jd, find(inputs, u_jd, random)[None]])
            return directions.signs(u_jd)
        if is_learned:
            return directions.centroids(inputs, self._copies, random)
        drawn_md = torch.from_numpy(rng.normal((self._copies, inputs.x_nd.shape[1]), random)).to(inputs.x_nd.dtype)
        basis_rd = directions.neutral(inputs, inputs.x_nd[:0])
        return directions.balanced(inputs, directions.corners(drawn_md - drawn_md @ basis_rd.T @ basis_rd))

    def blind(self, layer: int) -> tuple[Tensor, float]:
        """The same without any input."""
        shift = self._upcycling.shift
        assert isinstance(shift, float)
        rows_ed, gain_d = (self._read(layer, role) for role in (tensor_names.ROUTER, tensor_names.POST_ATTENTION_NORM))
        bits = log2(self._copies)
        count = int(bits) if bits.is_integer() else self._copies
        u_cd = directions.blind_directions(rows_ed, gain_d, count, self._random(layer))
        return shift * (directions.signs(u_cd) if bits.is_integer() else directions.corners(u_cd)), shift

    def _read(self, layer: int, role: str) -> Tensor:
        return self._weights.get(tensor_names.layer_name(self._config, layer, role))

    def _random(self, layer: int) -> rng.Stream:
        return rng.stream(self._seed, f"model.layers.{layer}.{tensor_names.ROUTER}/split")
