"""AdamW, or Muon on the hidden matrices and AdamW on the rest; weight decay on matrices only.

The state of either is read and restored by the names of the model's parameters, so that checkpoints do not depend on
how parameters are grouped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from aquilamoe.config.schema import OptimizerConfig

ADAMW_STATE = ("step", "exp_avg", "exp_avg_sq")
MUON_STATE = ("momentum_buffer",)
# What scores experts is no hidden matrix: its rows are classes, as the head's are.
_ROUTERS = ("mlp.gate.weight", "mlp.shared_expert_gate.weight")


def build(model: nn.Module, config: OptimizerConfig, learning_rate: float) -> AnyOptimizer:
    """The optimizer of a model. Gains and biases are not decayed; every matrix, embeddings included, is."""
    if config.name == "muon":
        return MuonAndAdamW(model, config, learning_rate)
    return _adamw(model.parameters(), config, learning_rate)


def _adamw(parameters: Iterable[nn.Parameter], config: OptimizerConfig, learning_rate: float) -> AdamW:
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for parameter in parameters:
        (matrices if parameter.ndim >= 2 else vectors).append(parameter)
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=learning_rate, betas=config.betas, eps=config.eps, fused=True)


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon is for it: a matrix, or a stack of experts' matrices, from hidden units to hidden units."""
    return name.startswith("model.layers.") and parameter.ndim >= 2 and not name.endswith(_ROUTERS)


class MuonAndAdamW:
    """Two optimizers as one (METHODS section 7). The matrices of stacked experts are orthogonalised one by one.

    Updates are scaled to the root mean square of AdamW's, so that one learning rate serves both.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig, learning_rate: float) -> None:
        hidden = {n: p for n, p in model.named_parameters() if is_hidden_matrix(n, p)}
        self.matrices = {parameter: _matrices(parameter) for parameter in hidden.values()}
        self.muon = Muon(
            [matrix for matrices in self.matrices.values() for matrix in matrices],
            lr=learning_rate,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            adjust_lr_fn="match_rms_adamw",
        )
        self.adamw = _adamw((p for p in model.parameters() if p not in self.matrices), config, learning_rate)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [*self.muon.param_groups, *self.adamw.param_groups]

    def step(self) -> None:
        for parameter, matrices in self.matrices.items():
            gradients = (None,) * len(matrices) if parameter.grad is None else _unbind(parameter.grad)
            for matrix, gradient in zip(matrices, gradients, strict=True):
                matrix.grad = gradient
        self.muon.step()
        self.adamw.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.muon.zero_grad(set_to_none)
        self.adamw.zero_grad(set_to_none)
        for parameter in self.matrices:
            parameter.grad = None


AnyOptimizer = Optimizer | MuonAndAdamW


def _unbind(tensor: Tensor) -> tuple[Tensor, ...]:
    return (tensor,) if tensor.ndim == 2 else tensor.unbind()


def _matrices(parameter: nn.Parameter) -> list[nn.Parameter]:
    """The matrices of a parameter, in the memory of the parameter."""
    return [nn.Parameter(matrix) for matrix in _unbind(parameter.detach())]


def read_state(model: nn.Module, optimizer: AnyOptimizer) -> dict[str, Tensor]:
    """The optimizer's state by `parameter/key`; that of stacked experts is stacked, too."""
    return {
        f"{name}/{key}": torch.stack(values) if parameter.ndim == 3 and len(values) > 1 else values[0]
        for name, parameter in model.named_parameters()
        for key, values in _states(parameter, optimizer)
    }


def _states(parameter: nn.Parameter, optimizer: AnyOptimizer) -> Iterator[tuple[str, list[Tensor]]]:
    if isinstance(optimizer, MuonAndAdamW) and parameter in optimizer.matrices:
        states = [optimizer.muon.state[matrix] for matrix in optimizer.matrices[parameter]]
        yield from ((key, [state[key] for state in states]) for key in MUON_STATE if states[0])
        return
    adamw = optimizer.adamw if isinstance(optimizer, MuonAndAdamW) else optimizer
    yield from ((key, [value]) for key, value in adamw.state[parameter].items())


def write_state(model: nn.Module, optimizer: AnyOptimizer, state: Mapping[str, Tensor]) -> None:
    """Restore what `read_state` returned. KeyError for a tensor that is not there."""
    for name, parameter in model.named_parameters():
        if isinstance(optimizer, MuonAndAdamW) and parameter in optimizer.matrices:
            for key in MUON_STATE:
                buffers = _unbind(state[f"{name}/{key}"].to(parameter.device, copy=True))
                for matrix, buffer in zip(optimizer.matrices[parameter], buffers, strict=True):
                    optimizer.muon.state[matrix] = {key: buffer}
        else:
            adamw = optimizer.adamw if isinstance(optimizer, MuonAndAdamW) else optimizer
            adamw.state[parameter] = {key: state[f"{name}/{key}"].to(parameter.device) for key in ADAMW_STATE}


def set_learning_rate(optimizer: AnyOptimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
