"""What the routers of a checkpoint do with held-out text of each language, and how alike its experts are."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from aquilamoe.model.transformer import Decoder, Routing

DIGITS = 6  # of shares, entropies and cosines


class Choices:
    """Which experts the tokens of each language choose, counted while a model is evaluated."""

    def __init__(self, model: "Decoder") -> None:
        from aquilamoe.model.transformer import MixtureOfExperts

        layers = enumerate(layer.mlp for layer in model.model.layers)
        self.sparse = {index: mlp for index, mlp in layers if isinstance(mlp, MixtureOfExperts)}
        self._counts: dict[str, list[torch.Tensor]] = {}  # by language: (experts,) of each sparse layer
        self._entropy: dict[str, torch.Tensor] = {}  # by language: (layers,), sums of nats
        self._tokens: dict[str, int] = {}

    def add(self, language: str, routings: "Sequence[Routing]") -> None:
        """Count one forward pass over text of a language."""
        import torch

        counts = [routing.counts_e.double() for routing in routings]
        entropies = [torch.special.entr(routing.logits_ne.double().softmax(dim=-1)).sum() for routing in routings]
        if language in self._counts:
            counts = [old + new for old, new in zip(self._counts[language], counts, strict=True)]
        self._counts[language] = counts
        self._entropy[language] = self._entropy.get(language, 0) + torch.stack(entropies)
        self._tokens[language] = self._tokens.get(language, 0) + len(routings[0].logits_ne)

    def table(self) -> dict[str, Any]:
        """By layer: shares of the experts and the routers' mean entropy in nats for each language, and cosines."""
        languages = {
            name: {
                "load": [_rounded(counts_e / counts_e.sum()) for counts_e in counts],
                "entropy": _rounded(self._entropy[name] / self._tokens[name]),
                "tokens": self._tokens[name],
            }
            for name, counts in self._counts.items()
        }
        cosines = [expert_cosines(mlp) for mlp in self.sparse.values()]
        return {"layers": list(self.sparse), "languages": languages, "cosine": [_rounded(each) for each in cosines]}


def expert_cosines(mlp: "torch.nn.Module") -> "torch.Tensor":
    """Cosines between all weights of one expert and those of another: (e, e), one on the diagonal."""
    import torch

    gram_ee: torch.Tensor | float = 0.0
    for name in ("gate_proj", "up_proj", "down_proj"):
        weights_ep = mlp.experts.get_parameter(name).detach().flatten(1).float()  # type: ignore[union-attr]
        gram_ee = gram_ee + weights_ep @ weights_ep.T
    norms_e = gram_ee.diagonal().sqrt()  # type: ignore[union-attr]
    return torch.as_tensor(gram_ee / torch.outer(norms_e, norms_e))


def figures(table: Mapping[str, Any]) -> dict[str, float]:
    """The table in a few numbers, means over layers.

    `expert_cosine`: mean over pairs of experts. `language_distance`: of two languages, the share of choices that would
    have to change for both to use the same experts as much (total variation), mean over pairs of languages.
    """
    found: dict[str, float] = {"expert_cosine": _mean([_off_diagonal(layer) for layer in table["cosine"]])}
    loads = {name: each["load"] for name, each in table["languages"].items()}
    for name, layers in loads.items():
        found[f"{name}/load_max_over_mean"] = _mean([max(shares) * len(shares) for shares in layers])
        found[f"{name}/router_entropy"] = _mean(table["languages"][name]["entropy"])
    distances = [
        sum(abs(a - b) for a, b in zip(one, other, strict=True)) / 2
        for first, second in combinations(loads, 2)
        for one, other in zip(loads[first], loads[second], strict=True)
    ]
    return found | ({"language_distance": _mean(distances)} if distances else {})


def _off_diagonal(cosines: Sequence[Sequence[float]]) -> float:
    size = len(cosines)
    return (sum(map(sum, cosines)) - sum(cosines[i][i] for i in range(size))) / max(1, size * (size - 1))


def _rounded(values: "torch.Tensor") -> Any:
    if values.dim() > 1:
        return [_rounded(row) for row in values]
    return [round(value, DIGITS) for value in values.tolist()]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
