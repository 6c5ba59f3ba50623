"""Networks with particulars by the modules of those without: constants are folded into the weights as they are read.

A network whose layers add m * f(x) is one whose o_proj and down_proj are multiplied by m, and so on: equal in exact
arithmetic, so that the certificate needs no second implementation of attention and experts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from aquilamoe.checkpoint import tensor_names
from aquilamoe.config.schema import ModelConfig
from aquilamoe.model.transformer import rotary_table

_QUERIES = (tensor_names.Q_WEIGHT, tensor_names.Q_BIAS)
_KEYS = (tensor_names.K_WEIGHT, tensor_names.K_BIAS)


def fold(model: ModelConfig, role: str, tensor: Tensor) -> Tensor:
    """A tensor of a layer, in place: what modules without particulars compute with it is what the model computes."""
    particulars = model.particulars
    if particulars is None:
        return tensor
    if tensor_names.writes_residual(role) and particulars.residual_multiplier != 1:
        tensor *= particulars.residual_multiplier
    if role in _QUERIES and particulars.attention_multiplier is not None:
        tensor *= particulars.attention_multiplier * model.head_dim**0.5
    if role in (*_QUERIES, *_KEYS) and model.rotary_dim < model.head_dim:
        return tensor.unflatten(0, (-1, model.head_dim))[:, _halves(model)].flatten(0, 1)
    return tensor


def _halves(model: ModelConfig) -> Tensor:
    """Channels of a head in an order in which the pairs of its rotating part are pairs of the whole: half apart."""
    rotating, others = torch.arange(model.head_dim).split([model.rotary_dim, model.head_dim - model.rotary_dim])
    return torch.cat([part.view(2, -1) for part in (rotating, others)], dim=1).flatten()


def table(model: ModelConfig, layer: int, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of a layer, of shape (length, head_dim): see `rotary_table`; 1 and 0 without rotary embedding."""
    cos_tc, sin_tc = rotary_table(model, length, torch.device("cpu"), dtype)
    if model.particulars is not None and layer in model.particulars.nope_layers:
        cos_tc, sin_tc = cos_tc[:, :0], sin_tc[:, :0]
    return _padded(cos_tc, model.head_dim, 1.0), _padded(sin_tc, model.head_dim, 0.0)


def _padded(table_tc: Tensor, size: int, value: float) -> Tensor:
    """Both halves of a table, made longer by pairs that do not rotate."""
    halves = table_tc.view(len(table_tc), 2, -1)
    return F.pad(halves, (0, size // 2 - halves.shape[2]), value=value).flatten(1)
