"""A training's metrics, exported to Ray by its workers: Ray's metrics, which Prometheus reads and Grafana shows.

Every value is a number that the host has anyway: a step's values, which it waits for once a step, seconds, and at
log points the sums of the routers. Workers export every `EVERY_S` seconds; a thread of Ray forwards the values. Ray
drops a gauge that was not set for a while: all are exported each time, those of log points too.
"""

import math
import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from aquilamoe.training.job import Job, MetricsExporter, Rank
from aquilamoe.training.peak import peak_flops_per_s

if TYPE_CHECKING:
    import torch

PREFIX = "efficientscale_"
TAGS = ("experiment", "stage", "fingerprint")
EVERY_S = 5.0
MOST_EXPERTS = 1024  # experts of all layers together up to which each has a series of its own
BUCKETS_S = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0]
WAIT = "wait"
STEP = "step"
CHECKPOINT = "checkpoint"

# By metric: what it is, and the tags it has besides those of all. Exported by the first rank, for all ranks together.
SHARED = {
    "progress": ("Share of the stage's tokens that are done", ()),
    "loss": ("Nats per token; split: train or validation, language: all or one of them", ("split", "language")),
    "router_loss": ("Before its coefficient; kind: balance or z", ("kind",)),
    "grad_norm": ("Norm of the gradient before clipping", ()),
    "learning_rate": ("Of the step", ()),
    "tokens_per_s": ("Tokens of all ranks in a second of steps: validation and saving left out", ()),
    "mfu": ("Model FLOP/s in the steps, as a share of the most that the devices can compute in the precision", ()),
    "skipped_steps": ("Steps without an update, since the stage began", ()),
    "rollbacks": ("Times that the stage went back to a checkpoint", ()),
    "checkpoints_passed_over": ("Damaged checkpoints that the stage did not resume from, since its workers began", ()),
    "router_dropped_tokens": ("Choices of the routers that no expert computed, since the log point before", ()),
    "router_load_max_over_mean": ("Tokens of the busiest expert over the mean", ("layer",)),
    "router_load_min_over_mean": ("Tokens of the idlest expert over the mean", ("layer",)),
    "router_entropy": ("Of the router's probabilities, in nats", ("layer",)),
    "router_load": ("Tokens of an expert over the mean", ("layer", "expert")),
}
# Exported by every rank.
COUNTERS = {
    "tokens": ("Tokens that this rank has trained on", ("rank",)),
    "seconds": ("Seconds of the training loop; part: wait for data, step, validation or checkpoint", ("rank", "part")),
}
# By name in a step's values: the metric and its further tags.
VALUES: dict[str, tuple[str, dict[str, str]]] = {
    "train/loss": ("loss", {"split": "train", "language": "all"}),
    "val/loss": ("loss", {"split": "validation", "language": "all"}),
    "train/balance_loss": ("router_loss", {"kind": "balance"}),
    "train/z_loss": ("router_loss", {"kind": "z"}),
    "train/grad_norm": ("grad_norm", {}),
    "train/learning_rate": ("learning_rate", {}),
    "train/skipped_steps": ("skipped_steps", {}),
    "train/rollbacks": ("rollbacks", {}),
    "router/dropped_tokens": ("router_dropped_tokens", {}),
    "checkpoint/passed_over": ("checkpoints_passed_over", {}),
}
OF_LANGUAGE = "val/loss/"


def meter(experiment: str) -> MetricsExporter | None:
    """The exporter of this process's trainings, if it is a worker of Ray's."""
    if "ray" not in sys.modules:
        return None
    import ray

    in_worker = ray.is_initialized() and ray.get_runtime_context().worker.mode == ray.WORKER_MODE
    return RayMetricsExporter(experiment) if in_worker else None


class RayMetricsExporter:
    """The metrics of one worker, for one training after the other.

    experiment: a tag of all of them.
    """

    def __init__(self, experiment: str) -> None:
        from ray.util.metrics import Counter, Gauge, Histogram

        self.experiment = experiment
        self.gauges = {
            name: Gauge(PREFIX + name, text, tag_keys=(*TAGS, *tags)) for name, (text, tags) in SHARED.items()
        }
        self.counters = {
            name: Counter(PREFIX + name, text, tag_keys=(*TAGS, *tags)) for name, (text, tags) in COUNTERS.items()
        }
        self.saving = Histogram(
            f"{PREFIX}checkpoint_seconds",
            "Seconds for which saving a checkpoint held up the steps",
            boundaries=BUCKETS_S,
            tag_keys=(*TAGS, "rank"),
        )

    def begins(self, job: Job, rank: Rank, device: "torch.device", step: int) -> None:
        """A training continues after this step."""
        directory = job.out.name.removesuffix(".partial")
        self.tags = {
            "experiment": self.experiment,
            "stage": job.name,
            "fingerprint": directory.removeprefix(f"{job.name}-"),
        }
        self.rank, self.is_first = {"rank": str(rank.rank)}, rank.rank == 0
        self.batch_tokens = job.stage.batch_tokens
        self.world_size = rank.world_size
        self.num_steps = job.stage.num_steps
        peak = peak_flops_per_s(device, job.stage.precision) * rank.world_size
        self.mfu_of_token_per_s = job.model.flops_per_token(job.stage.sequence_length) / peak
        self.layers = [str(layer) for layer in range(job.model.num_hidden_layers) if job.model.is_sparse(layer)]
        self.latest: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self.seconds: dict[str, float] = defaultdict(float)
        self.steps, self.exported_at = 0, time.monotonic()
        for name in ("skipped_steps", "rollbacks", "checkpoints_passed_over"):
            self._note(name, 0.0)
        self._note("progress", step / self.num_steps)
        self._export()

    def spent(self, part: str, seconds: float) -> None:
        """A part of the loop took so long."""
        self.seconds[part] += seconds
        if part == CHECKPOINT:
            self.saving.observe(seconds, tags=self.tags | self.rank)

    def stepped(self, step: int, values: Mapping[str, float]) -> None:
        """An optimizer step is done."""
        self.steps += 1
        if time.monotonic() - self.exported_at >= EVERY_S:
            self._note_values(step, values)
            self._export()

    def measured(self, step: int, values: Mapping[str, float], router: Mapping[str, Any] | None) -> None:
        """A log point, and the table of layers and experts that router.jsonl has of it."""
        self._note_values(step, values)
        if router:
            self._note_routers(router)
        self._export()

    def _note_values(self, step: int, values: Mapping[str, float]) -> None:
        self._note("progress", step / self.num_steps)
        busy = self.seconds[WAIT] + self.seconds[STEP]
        if self.steps and busy:
            tokens_per_s = self.steps * self.batch_tokens / busy
            self._note("tokens_per_s", tokens_per_s)
            self._note("mfu", tokens_per_s * self.mfu_of_token_per_s)
        for name, value in values.items():
            if name.startswith(OF_LANGUAGE):
                self._note("loss", value, split="validation", language=name.removeprefix(OF_LANGUAGE))
            elif name in VALUES:
                metric, tags = VALUES[name]
                self._note(metric, value, **tags)

    def _note_routers(self, router: Mapping[str, Any]) -> None:
        for layer, shares, entropy in zip(self.layers, router["load"], router["entropy"], strict=True):
            experts = len(shares)
            self._note("router_load_max_over_mean", max(shares) * experts, layer=layer)
            self._note("router_load_min_over_mean", min(shares) * experts, layer=layer)
            self._note("router_entropy", entropy, layer=layer)
            if experts * len(self.layers) <= MOST_EXPERTS:
                for expert, share in enumerate(shares):
                    self._note("router_load", share * experts, layer=layer, expert=str(expert))

    def _note(self, name: str, value: float, **tags: str) -> None:
        """A value that is not finite, as of a step that was skipped, leaves the one before."""
        if math.isfinite(value):
            self.latest[name, tuple(tags.items())] = value

    def _export(self) -> None:
        self.exported_at = time.monotonic()
        if self.steps:
            self.counters["tokens"].inc(self.steps * self.batch_tokens / self.world_size, tags=self.tags | self.rank)
        for part, seconds in self.seconds.items():
            if seconds > 0:
                self.counters["seconds"].inc(seconds, tags={**self.tags, **self.rank, "part": part})
        self.steps = 0
        self.seconds.clear()
        if self.is_first:
            for (name, tags), value in self.latest.items():
                self.gauges[name].set(value, tags=self.tags | dict(tags))
