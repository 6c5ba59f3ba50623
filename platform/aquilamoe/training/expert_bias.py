"""Balance without a loss: a bias on what the router chooses by, moved against the load (METHODS section 5)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from aquilamoe.model.transformer import MixtureOfExperts


class ExpertBias:
    """One bias for each expert of each layer of `network`, zero at first (arXiv 2408.15664).

    It is added to the probabilities that experts are chosen by, and to nothing else: gates do not use it. It is no
    part of the weights, because no architecture that is published has a place for it.
    """

    def __init__(self, network: nn.Module, rate: float) -> None:
        """network: it is on its device; rate: how far a bias moves in a step, > 0."""
        self.rate = rate
        self.layers = [module for module in network.modules() if isinstance(module, MixtureOfExperts)]
        weight_ed = self.layers[0].gate.weight
        self.bias_le = torch.zeros(len(self.layers), weight_ed.shape[0], device=weight_ed.device)
        self._choose_by(self.bias_le)

    @torch.no_grad()
    def update(self, load_le: Tensor) -> None:
        """Make crowded experts less likely in the next step: bias += rate * sign(mean load - load)."""
        load_le = load_le.float()
        self.bias_le += self.rate * (load_le.mean(dim=1, keepdim=True) - load_le).sign()

    def restore(self, bias_le: Tensor) -> None:
        """Resume from another's `bias_le`."""
        self.bias_le.copy_(bias_le)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Choose as the published model does, which has no bias."""
        self._choose_by([None] * len(self.layers))
        try:
            yield
        finally:
            self._choose_by(self.bias_le)

    def _choose_by(self, biases: "Tensor | list[None]") -> None:
        for layer, bias_e in zip(self.layers, biases, strict=True):
            layer.selection_bias_e = bias_e
