"""Causal grouped-query attention, two ways: torch's fused kernel, and products and a softmax written out.

Shapes: b batch, h query heads, g key-value heads (h is a multiple of g), t positions, c channels of a head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from aquilamoe.kernels.choice import AttentionKernel


def causal_attention(q_bhtc: Tensor, k_bgtc: Tensor, v_bgtc: Tensor, kernel: AttentionKernel) -> Tensor:
    """softmax(q k' / sqrt(c) where keys are not later than queries) v, of shape (b, h, t, c)."""
    if kernel == "explicit":
        return _explicit(q_bhtc, k_bgtc, v_bgtc)
    grouped = q_bhtc.shape[1] != k_bgtc.shape[1]
    return F.scaled_dot_product_attention(q_bhtc, k_bgtc, v_bgtc, is_causal=True, enable_gqa=grouped)


def _explicit(q_bhtc: Tensor, k_bgtc: Tensor, v_bgtc: Tensor) -> Tensor:
    """The query heads of a key-value head are stacked to one tall matrix, so that no key or value is repeated."""
    b, h, t, c = q_bhtc.shape
    g = k_bgtc.shape[1]
    tall_bgqc = (q_bhtc * c**-0.5).reshape(b, g, h // g * t, c)
    scores_bhtt = (tall_bgqc @ k_bgtc.transpose(-1, -2)).view(b, h, t, t)
    later_tt = torch.ones(t, t, dtype=torch.bool, device=q_bhtc.device).triu(1)
    shares_bhtt = scores_bhtt.masked_fill(later_tt, float("-inf")).softmax(dim=-1)
    return (shares_bhtt.to(v_bgtc.dtype).view(b, g, h // g * t, t) @ v_bgtc).view(b, h, t, c)
