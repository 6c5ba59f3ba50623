"""What a mix makes of the texts of its sources: the certificate of a growth that keeps no single function.

Fields beside those of every certificate (see `growth.certificate`), which compare the mix on each text with the source
of that text, as means over texts: `mix` has `texts`, their names; `losses`, of each source a list with its loss on each
text; `mix_losses`, of the mix on each text, all in nats/token; and `own_expert`, of each text the share of
(token, layer) whose best expert is that of its source.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aquilamoe.growth.forward import StreamedDecoder, opened
from aquilamoe.growth.logits import LogitDifference, compare
from aquilamoe.growth.stream import Progress, silent


@torch.no_grad()
def certify(
    sources: Sequence[Path],
    target: Path,
    texts: Sequence[tuple[str, Tensor]],
    *,
    tolerance: float,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Compare a mix with its sources on the text of each.

    Args:
        sources: directories of the checkpoints that were mixed.
        target: directory of their mix.
        texts: of each source, its name and int64 (sequences, length + 1); the last column is only predicted.
        tolerance: of growths that claim something; it is only passed on.
        progress: called with the number of layers computed, and of all layers of all checkpoints on all texts.

    Returns:
        The certificate.

    Raises:
        UserError: a file is damaged.
    """
    with opened(*sources, target) as checkpoints:
        *decoders, mixed = [StreamedDecoder(*checkpoint) for checkpoint in checkpoints]
        walk = _Passes(len(texts) * len(checkpoints) * mixed.config.num_hidden_layers, progress)
        differences: list[list[LogitDifference]] = []
        shares: list[float] = []
        for number, (_, tokens_bt) in enumerate(texts):
            mixed_btd, best = walk.run(mixed, tokens_bt)
            shares.append(sum((experts_n == number).double().mean().item() for experts_n in best) / max(1, len(best)))
            differences.append([])
            for decoder in decoders:
                own_btd, _ = walk.run(decoder, tokens_bt)
                differences[-1].append(compare((decoder, own_btd), (mixed, mixed_btd), tokens_bt[:, 1:]))
    own = [of_text[number] for number, of_text in enumerate(differences)]
    return {
        "max_abs_dlogit": max(each.max_abs_dlogit for each in own),
        "logit_spread": _mean([each.spread for each in own]),
        "kl": _mean([each.kl for each in own]),
        "source_loss": _mean([each.source_loss for each in own]),
        "target_loss": _mean([each.target_loss for each in own]),
        "tokens": sum(each.tokens for each in own),
        "preserving": False,
        "tolerance": tolerance,
        "layers": [],
        "ties": False,
        "rounding": None,
        "passed": True,
        "mix": {
            "texts": [name for name, _ in texts],
            "losses": [[of_text[number].source_loss for of_text in differences] for number in range(len(sources))],
            "mix_losses": [each.target_loss for each in own],
            "own_expert": shares,
        },
    }


class _Passes:
    """Decoders on their way through all layers."""

    def __init__(self, total: int, progress: Progress) -> None:
        self._done, self._total = 0, total
        self._progress = progress

    def run(self, decoder: StreamedDecoder, tokens_bt: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The stream behind the last layer, and the best expert of every token (n,) in each sparse layer."""
        x_btd = decoder.embed(tokens_bt[:, :-1])
        best: list[Tensor] = []
        for layer in range(decoder.config.num_hidden_layers):
            x_btd, routing = decoder.run_layer(layer, x_btd)
            if routing is not None:
                best.append(routing.logits_ne.argmax(dim=1))
            self._done += 1
            self._progress(self._done, self._total)
        return x_btd, best


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
