"""Routers of a mix, found from text of each source: no training, one pass over the tokens.

X are the inputs of a layer's router in the mix itself, whose layers below have their routers already. `ridge` solves
`(G + lambda I) W = C`: G is the mean of `x x^T`, every text with the same weight, C has the mean input of each text,
and lambda is `ridge` times the mean square of a channel. W.x then is the estimate, by least squares, of whether x is of
a source's text (DUME, arXiv 2603.29765). G and C are sums over texts: a further source adds a term. `hidden` takes the
mean input of a text, less the mean of all texts, as a row of length 1.

The shares of the chosen experts are a softmax of such scores. Least squares leaves them between about 0 and 1, a
softmax of which is nearly even, so that rows are multiplied by the factor that makes the softmax the best estimate of
which text a token is from, in nats; it is the same for all rows of a layer, and changes no choice.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from aquilamoe.checkpoint import tensor_names
from aquilamoe.checkpoint.sources import Sources
from aquilamoe.config.schema import ModelConfig, UpcyclingConfig
from aquilamoe.growth import mix
from aquilamoe.growth.forward import StreamedDecoder, opened
from aquilamoe.growth.lazy_tensor import LazyTensor
from aquilamoe.growth.stream import Progress, silent

# Of rows; texts that a router separates without an error would have any. Found by so many halvings of the interval.
LARGEST_FACTOR, HALVINGS = 16.0, 30


@torch.no_grad()
def fit(
    sources: Sequence[Path],
    target: ModelConfig,
    upcycling: UpcyclingConfig,
    seed: int,
    texts: Sequence[Tensor],
    *,
    progress: Progress = silent,
) -> dict[int, Tensor]:
    """Find the router of every layer.

    Args:
        sources: directories of the dense checkpoints.
        target: the model of their mix.
        upcycling: of method mix, with an initial router that is found from text.
        seed: of the mix.
        texts: int64 (sequences, length), of each source.
        progress: called with the number of layers computed, and of all layers.

    Returns:
        Rows (experts, d) float64 by layer, for `mix.mix`.

    Raises:
        UserError: a source is damaged.
    """
    with opened(*sources) as checkpoints, Sources(sources) as reader:
        recipes = mix.recipes(reader, checkpoints[0].config, target, upcycling, seed)
        rows = {name: recipe.rows for recipe in recipes for name in recipe.names}
        fitting = _Fitting(reader, rows, target, checkpoints[0].weights.dtype)
        decoder = StreamedDecoder(fitting, target)
        counts = [text_bt.numel() for text_bt in texts]
        x_btd = decoder.embed(torch.cat(list(texts)))
        for layer in range(target.num_hidden_layers):

            def find(x_nd: Tensor, layer: int = layer) -> None:
                if target.is_sparse(layer):
                    fitting.set(layer, router(x_nd.split(counts), upcycling))

            x_btd, _ = decoder.run_layer(layer, x_btd, find)
            progress(layer + 1, target.num_hidden_layers)
    return fitting.routers


def router(inputs: Sequence[Tensor], upcycling: UpcyclingConfig) -> Tensor:
    """The rows (experts, d) float64 of a layer's router, of what it reads of each text (n, d)."""
    wide = [x_nd.double() for x_nd in inputs]
    means_ed = torch.stack([x_nd.mean(dim=0) for x_nd in wide])
    if upcycling.router_init == "hidden":
        rows_ed = torch.nn.functional.normalize(means_ed - means_ed.mean(dim=0), dim=1)
    else:
        assert upcycling.ridge is not None
        moments_dd = sum(x_nd.T @ x_nd / len(x_nd) for x_nd in wide)
        assert isinstance(moments_dd, Tensor)
        moments_dd.diagonal().add_(upcycling.ridge * moments_dd.diagonal().mean().clamp(min=1e-30))
        rows_ed = torch.cholesky_solve(means_ed.T, torch.linalg.cholesky(moments_dd)).T
    return _factor([x_nd @ rows_ed.T for x_nd in wide]) * rows_ed


def _factor(scores: Sequence[Tensor]) -> float:
    """The factor of scores (n, e) of each text by which their softmax estimates best which text a token is from."""
    least, most = 0.0, LARGEST_FACTOR
    for _ in range(HALVINGS):
        factor = (least + most) / 2
        if _slope(scores, factor) < 0:
            least = factor
        else:
            most = factor
    return most


def _slope(scores: Sequence[Tensor], factor: float) -> float:
    """By how much the cross entropy, the mean over texts, grows with the factor; the slope grows with it, too."""
    slopes = [
        ((factor * scores_ne).softmax(dim=1) * scores_ne).sum(dim=1).mean() - scores_ne[:, number].mean()
        for number, scores_ne in enumerate(scores)
    ]
    return sum(slope.item() for slope in slopes)


class _Fitting:
    """The tensors of a mix, computed when they are read; routers are set before they are used.

    rows: of every tensor, by its name.
    routers: as they are set, by layer.
    """

    def __init__(
        self, reader: Sources, rows: Mapping[str, LazyTensor], config: ModelConfig, dtype: torch.dtype
    ) -> None:
        self.dtype = dtype
        self.routers: dict[int, Tensor] = {}
        self._reader, self._rows = reader, rows
        self._tensors = {
            tensor_names.layer_name(config, layer, tensor_names.ROUTER): torch.zeros(
                config.num_experts, config.hidden_size, dtype=dtype
            )
            for layer in range(config.num_hidden_layers)
            if config.is_sparse(layer)
        }
        self._names = {
            layer: tensor_names.layer_name(config, layer, tensor_names.ROUTER)
            for layer in range(config.num_hidden_layers)
        }

    def set(self, layer: int, router_ed: Tensor) -> None:
        """What a layer's router is from here on, in the tensor that its layer holds already."""
        self.routers[layer] = router_ed
        self._tensors[self._names[layer]].copy_(router_ed)

    def get(self, name: str) -> Tensor:
        """A tensor."""
        return self._tensors[name] if name in self._tensors else self.rows(name, 0, self._rows[name].shape[0])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows that are neighbours."""
        return self._take(name, self._rows[name][slice(start, stop)])

    def look_up(self, name: str, numbers_n: Tensor) -> Tensor:
        """Rows by their numbers."""
        return self._take(name, self._rows[name][numbers_n])

    def origin(self, name: str) -> str:
        """Not known to be equal to another."""
        return name

    def _take(self, name: str, rows: Tensor) -> Tensor:
        taken = rows.to(self.dtype, copy=True)
        for source in self._rows[name].sources:
            self._reader.release(source)
        return taken
