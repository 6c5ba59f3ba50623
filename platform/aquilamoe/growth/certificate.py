"""What a growth did to the function, measured on real tokens: the certificate of every growth (METHODS section 6).

Both networks run a layer at a time (see `growth.forward`), in step. Where a growth claims to keep the function, every
layer of the target is also given the stream of the *source*, and has to add what the source's layer adds. A
difference is then the fault of that layer alone, however deep it is, and rounding does not accumulate over the layers.

Fields of a certificate: `max_abs_dlogit`; `logit_spread`; `kl`, the mean of KL(source || target) in nats/token;
`source_loss` and `target_loss` in nats/token; `tokens` (predicted); `preserving` and `tolerance` of the claim;
`passed`: true, also of a growth that claims nothing; `layers`: of a claim with its growth, the relative difference
behind the embedding and behind each layer of the target; `ties`: whether logits differ by more than the tolerance, and
only because tokens chose between experts with equal scores: a Mixture of Experts is not continuous there; `rounding`:
where the growth was measured before it was rounded, what rounding does to it (see `_Walk.round`), otherwise None;
`experts`: only of more experts that a token chooses fewer of than it keeps the function for, see
`growth.expert_choices`.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aquilamoe.checkpoint import tensor_names
from aquilamoe.config.messages import UserError
from aquilamoe.config.schema import ModelConfig, UpcyclingConfig
from aquilamoe.growth.alignment import LEAST_UPDATE, Alignment, align
from aquilamoe.growth.bounds import COMPARED_TOKENS
from aquilamoe.growth.claim import Claim
from aquilamoe.growth.copied import Copied
from aquilamoe.growth.expert_choices import ExpertChoices, may_compare
from aquilamoe.growth.forward import Opened, StreamedDecoder, opened
from aquilamoe.growth.logits import LogitDifference, compare
from aquilamoe.growth.rounding import RoundedAgain, Unrounded, unrounded
from aquilamoe.growth.stream import Progress, silent
from aquilamoe.model.transformer import Routing

# Of the tolerance: what one layer may be off. In logits, the rounding of all layers adds up.
LAYER_SHARE = 1 / 8
# Experts whose scores are closer than this, as a fraction of the token's largest score, change places by rounding.
TIE = 1e-4


@torch.no_grad()
def certify(
    source: Path,
    target: Path,
    tokens_bt: Tensor,
    claim: Claim,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Compare two checkpoints on held-out tokens.

    The target may have further tokens: logits are compared on the source's vocabulary, `kl` and `target_loss` count the
    probability that the further ones take. Of a claim with its growth, what no token needed is compared with what the
    growth makes, so that few tokens are enough. Files of fewer bits are compared with it element by element, and what
    it makes before it is rounded is what is measured.

    Args:
        source, target: directories of the checkpoints before and after the growth.
        tokens_bt: int64 (sequences, length + 1); the last column is only predicted.
        claim: what the target is held to.
        progress: called with the number of layers computed, and of all layers of both.

    Returns:
        The certificate, with the fields that this module lists.

    Raises:
        UserError: the claim fails (names the first place that differs), a prediction is not finite, a file is damaged.
    """
    with opened(source, target) as (before, after):
        _check_vocabulary(before.config, after.config, tokens_bt)
        upcycling = claim.growth if isinstance(claim.growth, UpcyclingConfig) else None
        growth = claim.growth if claim.preserving else None
        made = unrounded(before, after, growth, claim.seed, claim.split) if growth is not None else None
        weights = _weights(before, after, made)
        walk = _Walk((before, after), weights, made is not None and made.rounds, tokens_bt, progress)
        walk.choices = _choices(before.config, after.config, upcycling, claim.preserving)
        if growth is None:
            walk.apart()
        else:
            walk.together(align(before.config, after.config, growth, claim.seed, before.weights.dtype))
        difference = walk.compare()
        fault, ties = walk.judge(difference, claim.tolerance) if claim.preserving else (None, False)
        if fault is not None:
            raise _broken(fault, difference, claim.tolerance, growth is not None)
        if made is not None:
            made.check_rest(after.weights.read | weights.equal)
        rounding = walk.round() if made is not None and made.rounds else None
    judged = {"layers": walk.differences, "ties": ties, "rounding": rounding, "passed": True}
    claimed = {"preserving": claim.preserving, "tolerance": claim.tolerance}
    experts = {} if walk.choices is None else {"experts": walk.choices.measures(upcycling)}
    certificate = {**_measures(difference), **claimed, **judged, **experts}
    _check_finite(certificate)
    return certificate


def _weights(source: Opened, target: Opened, made: Unrounded | None) -> Copied:
    """What the target computes with: where its files are rounded, what the growth makes before that."""
    is_made = made is not None and target.weights.is_rounded
    copies = {} if made is None else made.copies
    return Copied(made if made is not None and is_made else target.weights, source.weights, target.weights, copies)


def _choices(
    source: ModelConfig, target: ModelConfig, upcycling: UpcyclingConfig | None, preserving: bool
) -> ExpertChoices | None:
    """Where choices of experts are compared: of every split, and of other copies that claim nothing."""
    is_split = upcycling is not None and upcycling.method == "split"
    return ExpertChoices(source, target) if may_compare(source, target) and (is_split or not preserving) else None


def _measures(difference: LogitDifference) -> dict[str, Any]:
    return {
        "max_abs_dlogit": difference.max_abs_dlogit,
        "logit_spread": difference.spread,
        "kl": difference.kl,
        "source_loss": difference.source_loss,
        "target_loss": difference.target_loss,
        "tokens": difference.tokens,
    }


def _broken(fault: str, difference: LogitDifference, tolerance: float, is_known: bool) -> UserError:
    remedy = "grow it again" if is_known else "raise the tolerance if the files' dtype rounds that much"
    if not math.isfinite(difference.relative):
        remedy = "choose less noise, or a source with smaller weights"
    return UserError(
        f"certificate: the growth claims to keep the function, but {fault}; logits differ by up to "
        f"{difference.max_abs_dlogit:.3g} over {difference.tokens} tokens, {difference.relative:.3g} of their spread "
        f"(tolerance {tolerance:.3g}); {remedy}"
    )


def _check_finite(certificate: Mapping[str, Any]) -> None:
    """Refuse predictions that are infinite or no numbers: nothing is known of them, whatever was claimed."""
    for side in ("source", "target"):
        if not math.isfinite(loss := certificate[f"{side}_loss"]):
            raise UserError(
                f"certificate: the {side}'s loss is {loss} nats/token, so its weights are too large to compute with; "
                f"{'choose another source' if side == 'source' else 'grow it with smaller numbers, e.g. less noise'}"
            )
    rounding = certificate["rounding"] or {}
    measures = {**certificate, **{f"rounding.{key}": value for key, value in rounding.items()}}
    for key, value in measures.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(
                f"certificate: {key} is {value}, so weights of source or target are too large to compute with; choose "
                "another source, or grow it with smaller numbers, e.g. less noise"
            )


class _Walk:
    """Source and target on their way through the layers.

    weights: of the target, before they were rounded to what is in its files, where that is what walks.
    is_rounded: whether what rounding does is measured afterwards.
    differences: of the streams behind the embedding and behind each layer of the target, once they walk together.
    """

    def __init__(
        self,
        checkpoints: tuple[Opened, Opened],
        weights: Copied,
        is_rounded: bool,
        tokens_bt: Tensor,
        progress: Progress,
    ) -> None:
        source, target = self._opened = checkpoints
        self.source = StreamedDecoder(*source)
        self.target = StreamedDecoder(weights, target.config)
        inputs_bt, self.labels_bt = tokens_bt[:, :-1], tokens_bt[:, 1:]
        self._inputs_bt = inputs_bt
        self.source_btd, self.target_btd = self.source.embed(inputs_bt), self.target.embed(inputs_bt)
        self.compared = max(1, COMPARED_TOKENS // inputs_bt.shape[1])  # sequences
        self.differences: list[float] = []
        self.alignment: Alignment | None = None
        self.choices: ExpertChoices | None = None
        self._progress = progress
        self._done = 0
        self._rounds = 2 if is_rounded else 1
        self._step(0)

    def _step(self, layers: int = 1) -> None:
        self._done += layers
        total = self.source.config.num_hidden_layers + self.target.config.num_hidden_layers
        self._progress(self._done, self._rounds * total)

    def apart(self) -> None:
        """Each through its own layers."""
        if self.choices is None:
            self.source_btd = self._run(self.source, self.source_btd)
            self.target_btd = self._run(self.target, self.target_btd)
            return
        for layer in range(self.source.config.num_hidden_layers):
            read: list[Tensor] = []
            self.source_btd, before = self.source.run_layer(layer, self.source_btd, read.append)
            self._step()
            self.target_btd, after = self.target.run_layer(layer, self.target_btd)
            self._step()
            self._compare_choices(layer, read[0], before, after)

    def _compare_choices(self, layer: int, read_nd: Tensor, before: Routing | None, after: Routing | None) -> None:
        """What tokens choose in source and target; `after` may have further tokens behind those of `before`."""
        if self.choices is None or before is None or after is None:
            return
        router = tensor_names.layer_name(self.target.config, layer, tensor_names.ROUTER)
        count = len(before.experts_nk)
        chosen_nk = after.experts_nk[:count]
        own = Routing(after.logits_ne[:count], chosen_nk, chosen_nk.flatten().bincount(minlength=len(after.counts_e)))
        self.choices.add(read_nd, self.target.weights.get(router), before, own)

    def _run(self, decoder: StreamedDecoder, x_btd: Tensor) -> Tensor:
        for layer in range(decoder.config.num_hidden_layers):
            x_btd, _ = decoder.run_layer(layer, x_btd)
            self._step()
        return x_btd

    def round(self) -> dict[str, Any]:
        """What rounding does to predictions of the source, on some sequences; the files are that, to their last number.

        `dtype`, of the files; `tokens` (predicted); `target_*`: the target as it is in its files, beside the source;
        `source_*`: the source, rounded once more, beside itself. Of both, `relative`, the largest difference of a logit
        as a fraction of the logits' spread, and `kl` in nats/token.
        """
        source, target = self._opened
        file_dtype = target.weights.file_dtype
        measured: dict[str, Any] = {"dtype": str(file_dtype).removeprefix("torch.")}
        again = StreamedDecoder(RoundedAgain(source.weights, target.weights), source.config)
        for name, decoder in (("target", StreamedDecoder(*target)), ("source", again)):
            x_btd = self._run(decoder, decoder.embed(self._inputs_bt[: self.compared]))
            difference = compare((self.source, self._sample()), (decoder, x_btd), self.labels_bt[: self.compared])
            measured |= {
                "tokens": difference.tokens,
                f"{name}_relative": difference.relative,
                f"{name}_kl": difference.kl,
            }
        return measured

    def together(self, alignment: Alignment) -> None:
        """Every layer of the target beside the source's, which it must agree with."""
        self.alignment = alignment
        self._compare_streams(torch.zeros_like(self._sample()), self.target_btd[: self.compared], None)
        for layer, origin in enumerate(alignment.layers):
            entered_btd, routing = self._sample(), None
            read: list[Tensor] = []
            if origin is not None:
                self.source_btd, routing = self.source.run_layer(origin, self.source_btd, read.append)
                self._step()
            both_btd, both = self.target.run_layer(
                layer, torch.cat([self.target_btd, alignment.to_target(entered_btd)])
            )
            if read:
                self._compare_choices(layer, read[0], routing, both)
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

    def compare(self) -> LogitDifference:
        return compare((self.source, self.source_btd), (self.target, self.target_btd), self.labels_bt)

    def judge(self, logits: LogitDifference, tolerance: float) -> tuple[str | None, bool]:
        """What breaks the claim, if anything; and whether logits are as far off as they are because of ties."""
        for place, difference in enumerate(self.differences):
            if not difference <= LAYER_SHARE * tolerance:
                return self._describe(place - 1, difference, LAYER_SHARE * tolerance), False
        if logits.relative <= tolerance:
            return None, False
        if self.alignment is None:
            return "its predictions differ", False
        aligned_btd = self.alignment.to_target(self._sample())
        labels_bt = self.labels_bt[: self.compared]
        head = compare((self.source, self._sample()), (self.target, aligned_btd), labels_bt).relative
        if not head <= tolerance:
            return "they diverge in the final norm or the head", False
        if self.source.config.is_moe:
            return None, True
        return "small differences accumulate over all layers", False

    def _describe(self, layer: int, difference: float, tolerance: float) -> str:
        """Where the two diverge: in a layer of the target, or before the first (-1)."""
        assert self.alignment is not None
        if layer < 0:
            return f"they diverge in the embedding, by {difference:.3g} of its size (tolerance {tolerance:.3g})"
        origin = self.alignment.layers[layer]
        if origin is None:
            return (
                f"they diverge in layer {layer} of the target, a further copy that should be silent and changes the "
                f"stream by {LEAST_UPDATE * difference:.3g} of its size"
            )
        return (
            f"they diverge in layer {layer} of the target, which differs from layer {origin} of the source by "
            f"{difference:.3g} of what that adds (tolerance {tolerance:.3g})"
        )


def _tied(routing: Routing) -> Tensor:
    """Tokens (n,) of which rounding decides which experts they are sent to."""
    chosen = routing.experts_nk.shape[1]
    if chosen == routing.logits_ne.shape[1]:
        return torch.zeros(len(routing.logits_ne), dtype=torch.bool)
    top_nk = routing.logits_ne.topk(chosen + 1, dim=1).values
    return top_nk[:, -2] - top_nk[:, -1] <= TIE * routing.logits_ne.abs().amax(dim=1)


def _check_vocabulary(source: ModelConfig, target: ModelConfig, tokens_bt: Tensor) -> None:
    known, offered = source.vocab_size, target.vocab_size
    if offered < known:
        raise UserError(
            f"vocab_size: target {offered} is smaller than the source's {known}; compare checkpoints of one tokenizer"
        )
    if int(tokens_bt.max()) >= known:
        raise UserError(
            f"tokens: id {int(tokens_bt.max())} is among the tokens to compare on, the source has {known} tokens;  "
            "encode them with its tokenizer"
        )
