"""One optimizer step: micro-batches forward and backward, clip, update."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor, nn

from aquilamoe.model.transformer import Decoder, Routing
from aquilamoe.training import optimizer as optimizers
from aquilamoe.training import spikes
from aquilamoe.training.expert_bias import ExpertBias
from aquilamoe.training.job import Job, micro_batch_rows
from aquilamoe.training.master_weights import Bf16Copy
from aquilamoe.training.objective import RouterObjective
from aquilamoe.training.parallel import MASTER_IN_FLOAT32, ParallelContext
from aquilamoe.training.parts import Parts, RatesByPart
from aquilamoe.training.router_load import RouterLoad
from aquilamoe.training.schedules import learning_rate_factor
from aquilamoe.training.spikes import TrainProgress

LOAD, BIAS = "router_load", "selection_bias"  # among the tensors of a checkpoint


class TrainStep:
    """Takes optimizer steps with the model of a job.

    progress: counts the steps that are skipped. router_load, selection_bias: what the routers of a Mixture of Experts
    did and are to do, None where there are none; a checkpoint keeps them. parts: new and old weights that train at
    rates of their own; None where all train alike.
    """

    def __init__(
        self,
        job: Job,
        model: Decoder,
        optimizer: optimizers.AnyOptimizer,
        group: ParallelContext,
        progress: TrainProgress | None = None,
        *,
        parts: Parts | None = None,
    ) -> None:
        self.job = job
        self.model = model
        self.optimizer = optimizer
        self.group = group
        self.parts = parts
        self.progress = progress or TrainProgress()
        self.rows = micro_batch_rows(job.cluster, job.stage.sequence_length)
        router = job.stage.router
        self.coefficients = {
            "train/loss": 1.0,
            "train/balance_loss": router.balance_loss_coeff,
            "train/z_loss": router.z_loss_coeff,
        }
        self.rounded: Bf16Copy | None = None
        if job.stage.precision == MASTER_IN_FLOAT32 and not group.is_sharded:
            self.rounded = Bf16Copy(model, group)
        self.decoder = self.rounded.network if self.rounded else model  # what computes
        self.network: nn.Module = self.decoder if self.rounded else group.distribute(model)
        self.router_load: RouterLoad | None = None
        self.selection_bias: ExpertBias | None = None
        if job.model.is_moe:
            self.router_load = RouterLoad(job.model.num_sparse_layers, job.model.num_experts, group)
            if router.bias_update_rate:
                self.selection_bias = ExpertBias(self.decoder, router.bias_update_rate)

    def restore(self, extra: Mapping[str, Tensor]) -> None:
        """Resume from what `extra` returned; missing values begin at zero."""
        if self.router_load and LOAD in extra:
            self.router_load.restore(extra[LOAD])
        if self.selection_bias and BIAS in extra:
            self.selection_bias.restore(extra[BIAS])

    def extra(self) -> dict[str, Tensor]:
        """What a checkpoint keeps besides weights, moments and the step; all ranks call it together."""
        found = self.progress.extra()
        if self.router_load and not self.router_load.is_empty:
            found[LOAD] = self.router_load.gather()
        if self.selection_bias:
            found[BIAS] = self.selection_bias.bias_le
        return found

    def as_published(self) -> AbstractContextManager[None]:
        """In this context the model computes as it would from its files."""
        return self.selection_bias.off() if self.selection_bias else nullcontext()

    def step(self, step: int, rows: np.ndarray) -> dict[str, float]:
        """Train on this rank's rows (rows, sequence_length + 1); return the step's values, the same on all ranks.

        SpikeError if one of them forbids the step and the policy is not to skip it.
        """
        stage = self.job.stage
        total = stage.num_steps * stage.batch_tokens
        learning_rate = stage.learning_rate * learning_rate_factor(step * stage.batch_tokens, total, stage.schedule)
        rates = self.parts.rates(learning_rate, step * stage.batch_tokens) if self.parts else None
        optimizers.set_learning_rate(self.optimizer, learning_rate, rates.by_part if rates else {})
        router = RouterObjective(stage.router, self.group)
        losses = self.accumulate(rows, router)
        if self.parts:
            self.parts.drop_frozen_gradients()
            losses |= self.parts.norms(self.group)
        norm = self.group.clip(self.model, stage.optimizer.max_grad_norm)
        values = self.measured(losses | {"train/grad_norm": norm})
        if spike := spikes.find(self.job, self.progress, values, weights_of=step - 1):
            self._skip(spike)
        else:
            self._update(router, rates)
        self.optimizer.zero_grad(set_to_none=True)
        return values | {"train/learning_rate": learning_rate} | (rates.measured if rates else {})

    def _update(self, router: RouterObjective, rates: RatesByPart | None) -> None:
        if self.parts and rates:
            self.parts.update(self.optimizer, rates)
        else:
            self.optimizer.step()
        if self.rounded:
            self.rounded.round()
        if self.selection_bias:
            self.selection_bias.update(router.load())

    def _skip(self, spike: spikes.SpikeError) -> None:
        if self.job.stage.spikes.policy != "skip":
            raise spike
        spikes.count(self.job, self.progress, spike)
        self.progress.skipped_steps += 1

    def accumulate(self, rows: np.ndarray, router: RouterObjective) -> dict[str, Tensor]:
        """Leave the gradient of the global batch in the model's parameters; return this rank's mean losses, 0-dim."""
        chunks = torch.from_numpy(rows).to(self.group.device).split(self.rows)
        if self.job.model.is_moe and router.counts_first(len(chunks)):
            router.count(self._routings(chunk_bt) for chunk_bt in chunks)
        means: dict[str, Tensor] = {}
        for index, chunk_bt in enumerate(chunks):
            self.group.exchange_gradients(self.network, now=index == len(chunks) - 1)
            with self._autocast():
                loss, routings = self.network(chunk_bt[:, :-1], chunk_bt[:, 1:])
            losses: dict[str, Tensor] = {"train/loss": loss}
            if routings:
                losses["train/balance_loss"], losses["train/z_loss"] = router(routings)
                assert self.router_load is not None
                self.router_load.add(routings)
            del routings  # before the backward pass takes its memory
            share = chunk_bt.shape[0] / rows.shape[0]
            objective = torch.stack([c * losses[name] for name, c in self.coefficients.items() if name in losses]).sum()
            (objective * share).backward()
            if self.rounded:
                self.rounded.add_gradients()
            means = {name: means.get(name, 0.0) + share * loss.detach().double() for name, loss in losses.items()}
        if self.rounded:
            self.rounded.average_gradients()
        return means

    def measured(self, values: dict[str, Tensor]) -> dict[str, float]:
        """Means over the ranks: one exchange between them, and the one time in a step that the host waits."""
        sums = self.group.sum_(torch.stack([value.detach().double() for value in values.values()]))
        return dict(zip(values, (sums / self.group.world_size).tolist(), strict=True))

    @torch.no_grad()
    def _routings(self, tokens_bt: Tensor) -> Sequence[Routing]:
        with self._autocast():
            return self.decoder.route(tokens_bt[:, :-1])

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.group.device.type, torch.bfloat16, enabled=self.job.stage.precision == "bf16")
