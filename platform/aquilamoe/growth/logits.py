"""Two models' predictions compared over a vocabulary that is never in memory as a whole."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from aquilamoe.growth.bounds import LOGIT_COLUMNS, LOGIT_ROWS
from aquilamoe.growth.forward import StreamedDecoder


@dataclass(frozen=True, kw_only=True)
class LogitDifference:
    """What `compare` measured.

    max_abs_dlogit: over the source's vocabulary.
    spread: of the source's logits, their standard deviation over the vocabulary (root mean square over the tokens).
    kl: mean of KL(source || target), nats/token; the probability of the target's further tokens counts.
    source_loss, target_loss: nats/token.
    tokens: number of predictions.
    """

    max_abs_dlogit: float
    spread: float
    kl: float
    source_loss: float
    target_loss: float
    tokens: int

    @property
    def relative(self) -> float:
        """The largest difference of a logit as a fraction of the spread; 0 where all logits are equal."""
        return 0.0 if self.max_abs_dlogit == 0 else self.max_abs_dlogit / max(self.spread, 1e-30)


def compare(
    source: tuple[StreamedDecoder, Tensor], target: tuple[StreamedDecoder, Tensor], labels_bt: Tensor
) -> LogitDifference:
    """Compare predictions; each model comes with the stream behind its last layer (b, t, d).

    The target's vocabulary is the source's, perhaps with further tokens. Sums are taken in float64.
    """
    (source_model, source_btd), (target_model, target_btd) = source, target
    source_nd, target_nd = source_model.normalize(source_btd), target_model.normalize(target_btd)
    common, sums = source_model.config.vocab_size, _Sums(labels_bt.flatten())
    for start, stop in _slices(0, common, LOGIT_COLUMNS):
        source_vd, target_vd = source_model.head_rows(start, stop), target_model.head_rows(start, stop)
        for first, last in _slices(0, len(source_nd), LOGIT_ROWS):
            logits = source_nd[first:last] @ source_vd.T, target_nd[first:last] @ target_vd.T
            sums.add(slice(first, last), start, *logits)
    for start, stop in _slices(common, target_model.config.vocab_size, LOGIT_COLUMNS):
        target_vd = target_model.head_rows(start, stop)
        for first, last in _slices(0, len(target_nd), LOGIT_ROWS):
            sums.add_further(slice(first, last), target_nd[first:last] @ target_vd.T)
    return sums.result(common)


def _slices(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    return ((first, min(first + size, stop)) for first in range(start, stop, size))


class _Sums:
    """What is known of every token's predictions after some slices of the vocabulary."""

    def __init__(self, labels_n: Tensor) -> None:
        self.labels_n = labels_n
        zeros_n = torch.zeros(len(labels_n), dtype=torch.float64)
        self.worst = torch.zeros((), dtype=torch.float64)
        self.source_n, self.target_n = zeros_n - torch.inf, zeros_n - torch.inf  # logs of summed exponentials
        self.source_label_n, self.target_label_n = zeros_n.clone(), zeros_n.clone()
        self.mean_difference_n = zeros_n.clone()  # of logits, under the source's probabilities
        self.sum_n, self.square_sum_n = zeros_n.clone(), zeros_n.clone()  # of the source's logits

    def add(self, tokens: slice, start: int, source_nv: Tensor, target_nv: Tensor) -> None:
        """Logits of some tokens on a slice of the common vocabulary that begins at `start`."""
        self._add_labels(tokens, start, source_nv, target_nv)
        self.sum_n[tokens] += source_nv.sum(dim=1)
        self.square_sum_n[tokens] += torch.linalg.vecdot(source_nv, source_nv)
        self.add_further(tokens, target_nv)
        difference_nv = source_nv - target_nv
        self.worst = torch.maximum(self.worst, torch.linalg.vector_norm(difference_nv, torch.inf).double())
        here_n, weights_nv = _logsumexp(source_nv)
        mean_n = torch.linalg.vecdot(weights_nv, difference_nv).double() / weights_nv.sum(dim=1)
        before_n = self.source_n[tokens]
        after_n = torch.logaddexp(before_n, here_n)
        old_n, new_n = (before_n - after_n).exp(), (here_n - after_n).exp()
        self.mean_difference_n[tokens] = old_n * self.mean_difference_n[tokens] + new_n * mean_n
        self.source_n[tokens] = after_n

    def add_further(self, tokens: slice, target_nv: Tensor) -> None:
        """Logits on tokens of the vocabulary that only count as rivals of the others."""
        self.target_n[tokens] = torch.logaddexp(self.target_n[tokens], _logsumexp(target_nv)[0])

    def _add_labels(self, tokens: slice, start: int, source_nv: Tensor, target_nv: Tensor) -> None:
        columns_n = self.labels_n[tokens] - start
        (rows,) = ((columns_n >= 0) & (columns_n < source_nv.shape[1])).nonzero(as_tuple=True)
        self.source_label_n[tokens][rows] = source_nv[rows, columns_n[rows]].double()
        self.target_label_n[tokens][rows] = target_nv[rows, columns_n[rows]].double()

    def result(self, vocabulary: int) -> LogitDifference:
        variance_n = (self.square_sum_n / vocabulary - (self.sum_n / vocabulary).square()).clamp(min=0.0)
        kl = (self.mean_difference_n - self.source_n + self.target_n).mean()
        return LogitDifference(
            max_abs_dlogit=self.worst.item(),
            spread=variance_n.mean().sqrt().item(),
            kl=kl.clamp(min=0.0).item(),  # rounding alone could make it negative
            source_loss=(self.source_n - self.source_label_n).mean().item(),
            target_loss=(self.target_n - self.target_label_n).mean().item(),
            tokens=len(self.labels_n),
        )


def _logsumexp(logits_nv: Tensor) -> tuple[Tensor, Tensor]:
    """In float64; and the exponentials, each row as a multiple of its largest."""
    largest_n1 = logits_nv.amax(dim=1, keepdim=True)
    weights_nv = (logits_nv - largest_n1).exp_()
    return largest_n1[:, 0].double() + weights_nv.sum(dim=1).double().log(), weights_nv
