"""What a growth did to the function, measured on real tokens: the certificate of every growth (METHODS section 6).

Both networks run a layer at a time (see `growth.forward`), in step. Where a growth claims to keep the function, every
layer of the target is also given the stream of the *source*, and has to add what the source's layer adds. What is found
there is the fault of that layer alone, however deep it is, and rounding does not pile up over the layers.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aquilamoe.config.messages import UserError
from aquilamoe.config.schema import GrowthConfig, UpcyclingConfig
from aquilamoe.growth.alignment import LEAST_UPDATE, Alignment, align
from aquilamoe.growth.bounds import COMPARED_TOKENS
from aquilamoe.growth.forward import StreamedDecoder, opened
from aquilamoe.growth.logits import Comparison, compare
from aquilamoe.growth.stream import Progress, silent
from aquilamoe.model import Routing

# Of the tolerance: what one layer may be off. In logits, the rounding of all layers adds up.
LAYER_SHARE = 1 / 8
# Experts whose scores are closer than this, as a fraction of the token's largest score, change places by rounding.
TIE = 1e-4


@torch.no_grad()
def certify(
    source: Path,
    target: Path,
    tokens_bt: Tensor,
    preserving: bool,
    tolerance: float,
    growth: GrowthConfig | UpcyclingConfig | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Compare two checkpoints on `tokens_bt` (int64, of which the last column is only predicted).

    preserving: whether the growth claims to keep the function.
    tolerance: how far such a growth may be off: the largest difference of a logit, as a fraction of the spread of the
        source's logits (their standard deviation over the vocabulary). What a layer adds may differ by an eighth of
        that, as a fraction of what the source's layer adds. `bounds.default_tolerance` knows what rounding takes.
    growth, seed: what made the target of the source, so that layers can be compared; without it, logits alone are.
    progress: told of layers computed, of all layers of both.

    The target may have further tokens: logits are compared on the source's vocabulary, while `kl` and `target_loss`
    count the probability that the further ones take. Computed in float32, or float64 where a checkpoint has it, in
    memory of `bounds.certificate_bytes`.

    Returned: `max_abs_dlogit`; `logit_spread`; `kl`, the mean of KL(source || target) in nats/token; `source_loss` and
    `target_loss` in nats/token; `tokens` (predicted); `preserving` and `tolerance` as given; `passed`: true, also of a
    growth that claims nothing; `layers`: of a claim with its growth, the relative difference behind the embedding and
    behind each layer of the target; `ties`: whether logits differ by more than the tolerance, and only because tokens
    chose between experts with equal scores: a Mixture of Experts is not continuous there.
    Raises UserError when the claim does not hold, naming the first place where the two part, and for damaged files.
    """
    with opened(source, target) as (before, after):
        _check_vocabulary(before, after, tokens_bt)
        walk = _Walk(before, after, tokens_bt, progress)
        if preserving and growth is not None:
            walk.together(align(before.config, after.config, growth, seed, before.dtype))
        else:
            walk.apart()
        found = walk.compare()
        fault, ties = walk.judge(found, tolerance) if preserving else (None, False)
    if fault is not None:
        raise UserError(
            f"certificate: the growth claims to keep the function, but {fault}; logits differ by up to "
            f"{found.max_abs_dlogit:.3g} over {found.tokens} tokens, {found.relative:.3g} of their spread (tolerance "
            f"{tolerance:.3g}); raise the tolerance if the checkpoint's dtype rounds that much, otherwise grow it again"
        )
    return {
        "max_abs_dlogit": found.max_abs_dlogit,
        "logit_spread": found.spread,
        "kl": found.kl,
        "source_loss": found.source_loss,
        "target_loss": found.target_loss,
        "tokens": found.tokens,
        "preserving": preserving,
        "tolerance": tolerance,
        "passed": True,
        "layers": walk.differences,
        "ties": ties,
    }


class _Walk:
    """Source and target on their way through the layers.

    differences: of the streams behind the embedding and behind each layer of the target, once they walk together.
    """

    def __init__(self, source: StreamedDecoder, target: StreamedDecoder, tokens_bt: Tensor, progress: Progress) -> None:
        self.source, self.target = source, target
        inputs_bt, self.labels_bt = tokens_bt[:, :-1], tokens_bt[:, 1:]
        self.source_btd, self.target_btd = source.embed(inputs_bt), target.embed(inputs_bt)
        self.compared = max(1, COMPARED_TOKENS // inputs_bt.shape[1])  # sequences
        self.differences: list[float] = []
        self.alignment: Alignment | None = None
        self._progress, self._done = progress, 0
        self._step(0)

    def _step(self, layers: int = 1) -> None:
        self._done += layers
        total = self.source.config.num_hidden_layers + self.target.config.num_hidden_layers
        self._progress(self._done, total)

    def apart(self) -> None:
        """Each through its own layers."""
        for layer in range(self.source.config.num_hidden_layers):
            self.source_btd, _ = self.source.run_layer(layer, self.source_btd)
            self._step()
        for layer in range(self.target.config.num_hidden_layers):
            self.target_btd, _ = self.target.run_layer(layer, self.target_btd)
            self._step()

    def together(self, alignment: Alignment) -> None:
        """Every layer of the target beside the source's, which it must agree with."""
        self.alignment = alignment
        self._compare_streams(torch.zeros_like(self._sample()), self.target_btd[: self.compared], None)
        for layer, origin in enumerate(alignment.layers):
            entered_btd, routing = self._sample(), None
            if origin is not None:
                self.source_btd, routing = self.source.run_layer(origin, self.source_btd)
                self._step()
            both_btd, _ = self.target.run_layer(layer, torch.cat([self.target_btd, alignment.to_target(entered_btd)]))
            self.target_btd, made_btd = both_btd.tensor_split([len(self.target_btd)])
            self._step()
            self._compare_streams(entered_btd, made_btd, routing)

    def _sample(self) -> Tensor:
        return self.source_btd[: self.compared]

    def _compare_streams(self, before_btd: Tensor, target_btd: Tensor, routing: Routing | None) -> None:
        assert self.alignment is not None
        streams = (before_btd.flatten(0, 1), self._sample().flatten(0, 1), target_btd.flatten(0, 1))
        count = len(streams[0])
        counted_n = torch.ones(count, dtype=torch.bool) if routing is None else ~_tied(routing)[:count]
        self.differences.append(self.alignment.difference(*streams, counted_n))

    def compare(self) -> Comparison:
        return compare((self.source, self.source_btd), (self.target, self.target_btd), self.labels_bt)

    def judge(self, found: Comparison, tolerance: float) -> tuple[str | None, bool]:
        """What breaks the claim, if anything; and whether logits are as far off as they are because of ties."""
        for place, difference in enumerate(self.differences):
            if not difference <= LAYER_SHARE * tolerance:
                return self._describe(place - 1, difference, LAYER_SHARE * tolerance), False
        if found.relative <= tolerance:
            return None, False
        if self.alignment is None:
            return "its predictions are others", False
        aligned_btd = self.alignment.to_target(self._sample())
        labels_bt = self.labels_bt[: self.compared]
        head = compare((self.source, self._sample()), (self.target, aligned_btd), labels_bt).relative
        if not head <= tolerance:
            return "the two part in the final norm or the head", False
        if self.source.config.is_moe:
            return None, True
        return "small differences of all layers add up", False

    def _describe(self, layer: int, difference: float, tolerance: float) -> str:
        """Where the two part: in a layer of the target, or before the first (-1)."""
        assert self.alignment is not None
        if layer < 0:
            return f"the two part in the embedding, by {difference:.3g} of its size (tolerance {tolerance:.3g})"
        origin = self.alignment.layers[layer]
        if origin is None:
            return (
                f"the two part in layer {layer} of the target, a further copy that should be silent and changes the "
                f"stream by {LEAST_UPDATE * difference:.3g} of its size"
            )
        return (
            f"the two part in layer {layer} of the target, which differs from layer {origin} of the source by "
            f"{difference:.3g} of what that adds (tolerance {tolerance:.3g})"
        )


def _tied(routing: Routing) -> Tensor:
    """Tokens (n,) of which rounding decides which experts they are sent to."""
    chosen = routing.experts_nk.shape[1]
    if chosen == routing.logits_ne.shape[1]:
        return torch.zeros(len(routing.logits_ne), dtype=torch.bool)
    top_nk = routing.logits_ne.topk(chosen + 1, dim=1).values
    return top_nk[:, -2] - top_nk[:, -1] <= TIE * routing.logits_ne.abs().amax(dim=1)


def _check_vocabulary(source: StreamedDecoder, target: StreamedDecoder, tokens_bt: Tensor) -> None:
    known, offered = source.config.vocab_size, target.config.vocab_size
    if offered < known:
        raise UserError(
            f"vocab_size: target {offered} is smaller than the source's {known}; compare checkpoints of one tokenizer"
        )
    if int(tokens_bt.max()) >= known:
        raise UserError(
            f"tokens: {int(tokens_bt.max())} among those to compare on, the source knows {known}; "
            "encode them with its tokenizer"
        )
