"""What a growth did to the function, measured on real tokens: the certificate of every growth (METHODS section 6)."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from aquilamoe.config.messages import UserError
from aquilamoe.weights.huggingface import load_model


@torch.no_grad()
def certify(
    source: Path, target: Path, tokens_bt: Tensor, preserving: bool, tolerance: float
) -> dict[str, float | int | bool]:
    """Compare two checkpoints on `tokens_bt` (int64, of which the last column is only predicted).

    The target may have further tokens: logits are compared on the source's vocabulary, while `kl` and `target_loss`
    count the probability that the further ones take.
    Both are computed in float32, a sequence at a time. Returned: `max_abs_dlogit`; `kl`, the mean of
    KL(source || target) in nats/token; `source_loss` and `target_loss` in nats/token; `tokens` (predicted);
    `preserving` and `tolerance` as given; `passed`: whether the claim holds, true for a growth that claims nothing.
    Raises UserError when `preserving` and max_abs_dlogit exceeds `tolerance` (or is not a number).
    """
    models = [load_model(directory, dtype=torch.float32).eval() for directory in (source, target)]
    worst = torch.zeros(())
    sums = torch.zeros(3, dtype=torch.float64)  # kl, source loss, target loss
    for row_1t in tokens_bt.split(1):
        source_tv, target_tv = (model(row_1t[:, :-1])[0][0] for model in models)
        vocabulary = source_tv.shape[1]
        worst = torch.maximum(worst, (source_tv - target_tv[:, :vocabulary]).abs().max())
        source_tv, target_tv = source_tv.log_softmax(dim=-1), target_tv.log_softmax(dim=-1)
        # Rounding alone could make it negative.
        kl = F.kl_div(target_tv[:, :vocabulary], source_tv, reduction="sum", log_target=True).clamp(min=0.0)
        losses = [F.nll_loss(log_probs_tv, row_1t[0, 1:], reduction="sum") for log_probs_tv in (source_tv, target_tv)]
        sums += torch.stack([kl, *losses]).double()
    count = tokens_bt.shape[0] * (tokens_bt.shape[1] - 1)
    kl_mean, source_loss, target_loss = (sums / count).tolist()
    measured = worst.item()
    passed = not preserving or measured <= tolerance
    if not passed:
        raise UserError(
            f"certificate: the growth claims to keep the function, but logits differ by up to {measured:.3g} over "
            f"{count} tokens (tolerance {tolerance:.3g}); raise the tolerance if the checkpoint's dtype rounds that "
            "much, otherwise choose another growth"
        )
    return {
        "max_abs_dlogit": measured,
        "kl": kl_mean,
        "source_loss": source_loss,
        "target_loss": target_loss,
        "tokens": count,
        "preserving": preserving,
        "tolerance": tolerance,
        "passed": passed,
    }
