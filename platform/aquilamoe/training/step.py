"""One optimizer step: micro-batches forward and backward, clip, update."""

import numpy as np
import torch
from torch import Tensor

from aquilamoe.model import Decoder
from aquilamoe.training import optimizer as optimizers
from aquilamoe.training.job import Job, micro_batch_rows
from aquilamoe.training.objective import RouterObjective, cross_entropy
from aquilamoe.training.parallel import Group
from aquilamoe.training.schedules import learning_rate_factor
from aquilamoe.training.validation import require_finite


class Stepper:
    """One optimizer step: micro-batches forward and backward, clip, update."""

    def __init__(self, job: Job, model: Decoder, optimizer: optimizers.AnyOptimizer, group: Group) -> None:
        self.job, self.model, self.optimizer, self.group = job, model, optimizer, group
        self.rows = micro_batch_rows(job.cluster, job.stage.sequence_length)
        router = job.stage.router
        self.coefficients = {
            "train/loss": 1.0,
            "train/balance_loss": router.balance_loss_coeff,
            "train/z_loss": router.z_loss_coeff,
        }
        self.network = group.distribute(model)

    def step(self, step: int, rows: np.ndarray) -> dict[str, float]:
        """Train on this rank's rows (rows, sequence_length + 1) and return the step's values."""
        stage = self.job.stage
        total = stage.num_steps * stage.batch_tokens
        learning_rate = stage.learning_rate * learning_rate_factor(step * stage.batch_tokens, total, stage.schedule)
        optimizers.set_learning_rate(self.optimizer, learning_rate)
        values = self.accumulate(rows)
        norm = self.group.clip(self.model, stage.optimizer.max_grad_norm)
        values |= {"train/grad_norm": norm.item(), "train/learning_rate": learning_rate}
        require_finite(self.job, step, values, weights_of=step - 1)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return values

    def accumulate(self, rows: np.ndarray) -> dict[str, float]:
        """Leave the gradient of the global batch in the parameters; return its mean losses and the expert load."""
        router = RouterObjective(self.job.stage.router, self.group)
        chunks = torch.from_numpy(rows).to(self.group.device).split(self.rows)
        losses: dict[str, Tensor] = {}
        totals = torch.zeros((), dtype=torch.float64, device=self.group.device)
        for index, chunk_bt in enumerate(chunks):
            self.group.exchange_gradients(self.network, now=index == len(chunks) - 1)
            losses = self._losses(chunk_bt, router)
            share = chunk_bt.shape[0] / rows.shape[0]
            objective = sum(self.coefficients[name] * loss for name, loss in losses.items())
            (objective * share).backward()
            totals = totals + share * torch.stack([loss.detach().double() for loss in losses.values()])
        means = self.group.sum_(totals) / self.group.world_size
        values = dict(zip(losses, means.tolist(), strict=True))
        return values | ({"router/load_max_over_mean": router.load_max_over_mean()} if self.job.model.is_moe else {})

    def _losses(self, tokens_bt: Tensor, router: RouterObjective) -> dict[str, Tensor]:
        with torch.autocast(self.group.device.type, torch.bfloat16, enabled=self.job.stage.precision == "bf16"):
            logits_btv, routings = self.network(tokens_bt[:, :-1])
        losses = {"train/loss": cross_entropy(logits_btv, tokens_bt[:, 1:])}
        if routings:
            losses["train/balance_loss"], losses["train/z_loss"] = router(routings)
        return losses
