"""AdamW, or Muon on the hidden matrices and AdamW on the rest; weight decay on matrices only.

The state of either is read and restored by the names of the model's parameters, so that checkpoints do not depend on
how parameters are grouped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from aquilamoe.checkpoint.dtensor import stack, unstack
from aquilamoe.config.steps import OptimizerConfig, Role, RoleConfig
from aquilamoe.training.gathering_muon import GatheringMuon

RATIO = "learning_rate_ratio"  # of a group, to the learning rate of the step
PART = "part"  # of a group: of a model that was grown, new | old | mixed; empty where all parts train alike
ALIKE: Mapping[str, Any] = {}
ADAMW_STATE = ("step", "exp_avg", "exp_avg_sq")
MUON_STATE = ("momentum_buffer",)
# What scores experts is no hidden matrix: its rows are classes, as the head's are.
_ROUTERS = ("mlp.gate.weight", "mlp.shared_expert_gate.weight")


def build(
    model: nn.Module,
    config: OptimizerConfig,
    learning_rate: float,
    part_of: Mapping[str, str] = ALIKE,
    scales: Mapping[str, float] = ALIKE,
) -> AnyOptimizer:
    """The optimizer of a model. Gains and biases are not decayed; every matrix, embeddings included, is.

    part_of: new, old or mixed, by the name of a parameter. Parameters without gradients are left out.
    scales: of AdamW's learning rates, by the name of a parameter; 1 where there is none.
    """
    if config.name == "muon" and any(is_hidden_matrix(*each) for each in _trained(model)):
        return MuonAndAdamW(model, config, learning_rate, part_of)
    return _adamw(_trained(model), _Settings(config, learning_rate, part_of, scales))


@dataclass(frozen=True)
class _Settings:
    """What parameters are grouped by."""

    config: OptimizerConfig
    learning_rate: float
    part_of: Mapping[str, str]
    scales: Mapping[str, float] = field(default_factory=dict)


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def role_of(name: str) -> Role:
    """What the parameter of this name is for; a tied head is an embedding, a shared expert a feed-forward."""
    if name.endswith(_ROUTERS):
        return "router"
    if name.endswith("norm.weight"):
        return "norm"
    places: dict[str, Role] = {
        "lm_head.": "head",
        "model.embed_tokens.": "embedding",
        ".self_attn.": "attention",
        ".mlp.experts.": "expert",
        ".mlp.": "feed_forward",
    }
    return next(role for place, role in places.items() if place in name)


def _groups(parameters: Iterable[tuple[str, nn.Parameter]], settings: _Settings) -> list[dict[str, Any]]:
    """Parameters by how they are treated, which their role may change; torch needs equal settings in a group."""
    groups: dict[tuple[float, float, str, Any], list[nn.Parameter]] = {}
    config = settings.config
    for name, parameter in parameters:
        own = config.roles.get(role_of(name), RoleConfig())
        decay = config.weight_decay if own.weight_decay is None else own.weight_decay
        # One fused update is for tensors that are cut among the same processes.
        mesh = getattr(parameter, "device_mesh", None)
        part = settings.part_of.get(name, "")
        ratio = own.learning_rate_ratio * settings.scales.get(name, 1.0)
        key = (ratio, decay if parameter.ndim >= 2 else 0.0, part, mesh)
        groups.setdefault(key, []).append(parameter)
    return [
        {"params": members, "weight_decay": decay, RATIO: ratio, PART: part, "lr": ratio * settings.learning_rate}
        for (ratio, decay, part, _), members in groups.items()
    ]


def _adamw(parameters: Iterable[tuple[str, nn.Parameter]], settings: _Settings) -> AdamW:
    betas, eps = settings.config.betas, settings.config.eps
    return AdamW(_groups(parameters, settings), betas=betas, eps=eps, fused=True)


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon is for it: a matrix, or a stack of experts' matrices, from hidden units to hidden units."""
    return name.startswith("model.layers.") and parameter.ndim >= 2 and not name.endswith(_ROUTERS)


class MuonAndAdamW:
    """Two optimizers as one (METHODS section 7). The matrices of stacked experts are orthogonalised one by one.

    Updates are scaled to the root mean square of AdamW's, so that one learning rate serves both.
    """

    def __init__(
        self, model: nn.Module, config: OptimizerConfig, learning_rate: float, part_of: Mapping[str, str] = ALIKE
    ) -> None:
        settings = _Settings(config, learning_rate, part_of)
        trained = _trained(model)
        hidden = {n: p for n, p in trained if is_hidden_matrix(n, p)}
        self.matrices = {parameter: _matrices(parameter) for parameter in hidden.values()}
        is_cut = any(hasattr(parameter, "device_mesh") for parameter in self.matrices)
        self.muon = (GatheringMuon if is_cut else Muon)(
            _groups(
                ((name, matrix) for name, parameter in hidden.items() for matrix in self.matrices[parameter]),
                settings,
            ),
            momentum=config.momentum,
            adjust_lr_fn="match_rms_adamw",
        )
        self.adamw = _adamw(((n, p) for n, p in trained if n not in hidden), settings)

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
    return (tensor,) if tensor.ndim == 2 else unstack(tensor)


def _matrices(parameter: nn.Parameter) -> list[nn.Parameter]:
    """The matrices of a parameter, in the memory of the parameter."""
    return [nn.Parameter(matrix) for matrix in _unbind(parameter.detach())]


def read_state(model: nn.Module, optimizer: AnyOptimizer) -> dict[str, Tensor]:
    """The optimizer's state by `parameter/key`; that of stacked experts is stacked, too, and cut as they are."""
    return {
        f"{name}/{key}": value for name, parameter in _trained(model) for key, value in _state(parameter, optimizer)
    }


def _state(parameter: nn.Parameter, optimizer: AnyOptimizer) -> Iterable[tuple[str, Tensor]]:
    if not isinstance(optimizer, MuonAndAdamW):
        return optimizer.state[parameter].items()
    if parameter not in optimizer.matrices:
        return optimizer.adamw.state[parameter].items()
    if not optimizer.muon.state:
        return ()
    states = [optimizer.muon.state[matrix] for matrix in optimizer.matrices[parameter]]
    stacked = (stack([state[key] for state in states], parameter) for key in MUON_STATE)
    return zip(MUON_STATE, stacked, strict=True)


def write_state(model: nn.Module, optimizer: AnyOptimizer, state: Mapping[str, Tensor]) -> None:
    """Restore what `read_state` returned. KeyError for a tensor that is not there."""
    for name, parameter in _trained(model):
        if isinstance(optimizer, MuonAndAdamW) and parameter in optimizer.matrices:
            for key in MUON_STATE:
                buffers = _unbind(state[f"{name}/{key}"].to(parameter.device, copy=True))
                for matrix, buffer in zip(optimizer.matrices[parameter], buffers, strict=True):
                    optimizer.muon.state[matrix] = {key: buffer}
        else:
            adamw = optimizer.adamw if isinstance(optimizer, MuonAndAdamW) else optimizer
            adamw.state[parameter] = {key: state[f"{name}/{key}"].to(parameter.device) for key in ADAMW_STATE}


def set_learning_rate(optimizer: AnyOptimizer, learning_rate: float, by_part: Mapping[str, float] = ALIKE) -> None:
    """Set that of every group, which its role may raise or lower. by_part: those of new, old and mixed parameters."""
    for group in optimizer.param_groups:
        group["lr"] = by_part.get(group[PART], learning_rate) * group[RATIO]
