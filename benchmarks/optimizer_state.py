"""What it is worth to grow Adam's moments with the weights. Writes docs/optimizer-state.md and its figure.

python benchmarks/optimizer_state.py

A small model is trained on the embedded corpus, grown, and trained on for 100 steps: with moments that begin at zero,
and with those of the source. Everything else is the same in each pair: weights, data, learning rates. Runs that are
complete in `--work` are not run again.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
import torch
from omegaconf import OmegaConf
from torch import Tensor

from aquilamoe.checkpoint.state_dict import load_model
from aquilamoe.config import graph
from aquilamoe.config.graph import Node
from aquilamoe.config.schema import ClusterConfig, CorpusStage, ModelConfig, PretrainStage, ScaleOutStage, ScaleUpStage
from aquilamoe.data.corpus import prepare_corpus
from aquilamoe.data.encoding import tokenize_corpus
from aquilamoe.data.loader import Batches
from aquilamoe.data.tokenizer import train_tokenizer
from aquilamoe.growth import gradient_maps, optimizer_state
from aquilamoe.growth.optimizer_state import grow_moments
from aquilamoe.growth.scale_out import scale_out
from aquilamoe.growth.scale_up import scale_up
from aquilamoe.growth.stream import silent
from aquilamoe.reports import canvas
from aquilamoe.training.checkpoint import MOMENTS, TRAINING
from aquilamoe.training.job import Job
from aquilamoe.training.loop import train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
PAGE, FIGURE = ROOT / "docs/optimizer-state.md", ROOT / "docs/optimizer-state.svg"

SEEDS = (1, 2, 3)
BATCH = 2048  # tokens of a step
SOURCE_STEPS, STEPS, WARMUP_STEPS = 300, 100, 20
VALIDATION_TOKENS = 16_384  # of each language
GRADIENT_BATCHES = 24
STATES = ("reset", "grow")
CLUSTER = ClusterConfig(
    executor="process",
    address=None,
    workers=1,
    cpus_per_worker=1,
    gpus_per_worker=0,
    gpu_memory_bytes=0,
    max_failures=0,
    micro_batch_tokens=BATCH,
    checkpoint_every_tokens=10**9,
    compile=False,
    flops_per_s=1e9,
)
WARMUPS = (WARMUP_STEPS, 0)


@dataclass(frozen=True)
class Case:
    """A growth: the command-line arguments that request it, the stage that does it, and warm-ups to train on with."""

    name: str
    words: tuple[str, ...]
    stage: str = "scale_up"
    warmups: tuple[int, ...] = WARMUPS

    @property
    def title(self) -> str:
        return " ".join(word for word in self.words if ".inputs." not in word)


SILENT = "growth.new_layers=zero"
CASES = (
    Case("noise-0", ("growth=fpi", "growth.noise=0", SILENT)),
    Case("noise-0.5", ("growth=fpi", "growth.noise=0.5", SILENT)),
    Case("aki-pro", ("growth=aki_pro",)),
    Case("upcycling", ("upcycling=copy", "stages.scale_out.inputs.source=prepare"), "scale_out", ()),
)


@dataclass(frozen=True)
class Run:
    """One continuation of a grown model."""

    case: Case
    seed: int
    state: str
    warmup_steps: int

    @property
    def name(self) -> str:
        return f"{self.case.name}/{self.seed}/{self.state}-{self.warmup_steps}"


def compose(words: tuple[str, ...], seed: int) -> dict[str, Node]:
    """The experiment of conf/config.yaml with smaller batches."""
    prepare = f"stages.prepare.total_tokens={SOURCE_STEPS * BATCH}"
    batches = [f"stages.{stage}.batch_tokens={BATCH}" for stage in ("prepare", "dense", "moe", "control")]
    small = [f"stages.dense.total_tokens={STEPS * BATCH}", "stages.dense.schedule.warmup_tokens=0"]
    small += [f"{key}=null" for key in ("stages.control", "stages.evaluate.inputs.control", "report.control")]
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        values: Any = hydra.compose(
            "config", [f"seed={seed}", "cluster=local_process", prepare, *batches, *small, *words]
        )
    composed: Any = OmegaConf.to_container(values, resolve=True)
    return graph.build(graph.parse(composed))


class Bench:
    """The directory in which runs are kept."""

    def __init__(self, work: Path) -> None:
        self.work = work

    @cached_property
    def tokens(self) -> Path:
        out = self.work / "tokens"
        if not out.exists():
            stages = {name: node.stage for name, node in compose((), SEEDS[0]).items()}
            corpus, tokenizer = self.work / "corpus", self.work / "tokenizer"
            assert isinstance(stages["corpus"], CorpusStage)
            prepare_corpus(stages["corpus"], corpus)
            train_tokenizer(corpus, 4096, tokenizer)
            unfinished = self.work / "tokens.partial"
            tokenize_corpus(corpus, tokenizer, unfinished)
            unfinished.rename(out)
        return out

    def source(self, seed: int) -> Path:
        """The small model, trained."""
        out = self.work / "source" / str(seed)
        if not (out / "result.json").exists():
            node = compose((), seed)["prepare"]
            stage = _pretrain(node, 3e-3, warmup_steps=20)
            self._train(stage, node.model, None, out, 0)
        return out

    def grown(self, case: Case, seed: int) -> tuple[Path, ModelConfig]:
        """The grown model, with the grown state beside it."""
        node = compose(case.words, seed)[case.stage]
        stage, source, out = node.stage, self.source(seed), self.work / case.name / str(seed) / "grown"
        assert isinstance(stage, (ScaleUpStage, ScaleOutStage)) and node.model and node.source_model
        if not out.exists():
            unfinished = out.with_name("grown.partial")
            if isinstance(stage, ScaleUpStage):
                scale_up(source / "model", unfinished / "model", node.model, stage.growth, seed)
            else:
                scale_out(source / "model", unfinished / "model", node.model, stage.upcycling, seed)
            how = stage.growth if isinstance(stage, ScaleUpStage) else stage.upcycling
            (unfinished / TRAINING).mkdir(exist_ok=True)
            configs = (node.source_model, node.model)
            grow_moments(
                source / TRAINING / MOMENTS,
                unfinished / TRAINING / MOMENTS,
                configs,
                how,
                seed,
                progress=silent,
            )
            unfinished.rename(out)
        return out, node.model

    def run(self, run: Run) -> None:
        """Continue, unless it was done."""
        out = self.work / run.name
        if (out / "result.json").exists():
            return
        grown, model = self.grown(run.case, run.seed)
        stage = _pretrain(compose((), run.seed)["dense"], 1e-3, run.warmup_steps)
        state = "keep" if run.state == "grow" else "reset"
        self._train(stage.model_copy(update={"optimizer_state": state}), model, grown, out, SOURCE_STEPS * BATCH)

    def _train(
        self, stage: PretrainStage, model: ModelConfig | None, source: Path | None, out: Path, before: int
    ) -> None:
        assert model is not None
        job = Job(
            name=out.name,
            stage=stage,
            model=model,
            tokens=self.tokens,
            source=source,
            out=out,
            ancestor_tokens=before,
            ancestor_flops=0,
            cluster=CLUSTER,
        )
        summary = train(job)
        (out / "result.json").write_text(json.dumps(summary))

    def losses(self, run: Run) -> list[float]:
        """Training loss of every step."""
        return [point["train/loss"] for point in self._points(run) if "train/loss" in point]

    def held_out(self, run: Run) -> float:
        """Loss on held-out text at the end."""
        return self._points(run)[-1]["val/loss"]

    def _points(self, run: Run) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.work / run.name / "metrics.jsonl").read_text().splitlines()]


def _pretrain(node: Node, learning_rate: float, warmup_steps: int) -> PretrainStage:
    stage = node.stage
    assert isinstance(stage, PretrainStage)
    schedule = stage.schedule.model_copy(update={"warmup_tokens": warmup_steps * BATCH, "decay_tokens": 0})
    tokens = {"validate_every_tokens": 10**9, "validation_tokens": VALIDATION_TOKENS}
    return stage.model_copy(update={"learning_rate": learning_rate, "schedule": schedule, **tokens})


PARTS = {
    "embedding": ("embed_tokens",),
    "head": ("lm_head",),
    "gains": ("norm.",),
    "q, o": ("q_proj", "o_proj"),
    "k, v": ("k_proj", "v_proj"),
    "feed-forward": ("mlp.",),
}


def mean_gradient(bench: Bench, checkpoint: Path) -> dict[str, Tensor]:
    """Of the cross-entropy, over some batches."""
    model = load_model(checkpoint / "model")
    mixture = compose((), SEEDS[0])["prepare"].stage.model_dump()["mixture"]
    batches = Batches(bench.tokens, mixture, 128, BATCH // 128, seed=0)
    for _, rows in zip(range(GRADIENT_BATCHES), batches.iterate(0), strict=False):
        tokens_bt = torch.from_numpy(rows)
        (model(tokens_bt[:, :-1], tokens_bt[:, 1:])[0] / GRADIENT_BATCHES).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def agreement(bench: Bench, case: Case) -> list[str]:
    """Cosine between the source's gradient, mapped, and that of the grown model: where it is mapped, by parts."""
    seed = SEEDS[0]
    grown, model = bench.grown(case, seed)
    before, after = mean_gradient(bench, bench.source(seed)), mean_gradient(bench, grown)
    node = compose(case.words, seed)[case.stage]
    assert isinstance(node.stage, (ScaleUpStage, ScaleOutStage)) and node.source_model
    how = node.stage.growth if isinstance(node.stage, ScaleUpStage) else node.stage.upcycling
    sums = {part: torch.zeros(3, dtype=torch.float64) for part in PARTS}
    for name, pasts in gradient_maps.gradient_maps(node.source_model, model, how, seed):
        part = next((part for part, words in PARTS.items() if any(word in name for word in words)), None)
        for index, past in enumerate(pasts):
            mapped = optimizer_state.first(before[past.name], past)
            found = after[name][index] if len(pasts) > 1 else after[name]
            if part is not None:
                found = found.where(mapped != 0, 0)
                sums[part] += torch.stack([(mapped * found).sum(), mapped.square().sum(), found.square().sum()])
    return [f"{(dot / (one * two).sqrt()).item():.3f}" for dot, one, two in sums.values()]


def paired(case: Case, warmup_steps: int, measure: Callable[[Run], float]) -> str:
    """Means of both states, and what growing the state changes: over the seeds the mean, the least and the most."""
    values = {s: [measure(Run(case, seed, s, warmup_steps)) for seed in SEEDS] for s in STATES}
    change = [grow - reset for reset, grow in zip(*values.values(), strict=True)]
    means = " | ".join(f"{statistics.mean(found):.3f}" for found in values.values())
    return f"{means} | **{statistics.mean(change):+.3f}** ({min(change):+.3f} to {max(change):+.3f})"


def rows(measure: Callable[[Run], float]) -> str:
    """A table of one measure."""
    head = ["growth", "warm-up, steps", "reset", "grow", "grow - reset (least to most)"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for case in CASES:
        for warmup in case.warmups:
            lines.append(f"| `{case.title}` | {warmup} | {paired(case, warmup, measure)} |")
    return "\n".join(lines)


def smooth(values: Sequence[float], width: int = 5) -> list[float]:
    """Mean of the last few values at every place."""
    return [statistics.mean(values[max(0, end - width) : end]) for end in range(1, len(values) + 1)]


def draw(bench: Bench, figure: "Figure", narrow: bool) -> None:  # noqa: ARG001 - of wide pages only
    """Mean training loss over the seeds, a panel for each growth."""
    panels = figure.subplots(1, 3).flatten()
    cases = [case for case in CASES if case.warmups]
    for panel in panels[len(cases) :]:
        panel.remove()
    for panel, case in zip(panels, cases, strict=False):
        for state, color in zip(STATES, (canvas.CONTROL, canvas.PALETTE[0]), strict=True):
            for warmup in case.warmups:
                curves = [smooth(bench.losses(Run(case, seed, state, warmup))) for seed in SEEDS]
                mean = [statistics.mean(step) for step in zip(*curves, strict=True)]
                label = f"{state}, {'warm-up' if warmup else 'no warm-up'}"
                style = "--" if warmup else "-"
                panel.plot(range(1, STEPS + 1), mean, style, color=color, linewidth=1.4, label=label)
        panel.set_title(case.title.replace(f" {SILENT}", ""), fontsize=9, loc="left")
        panel.set_xlabel("optimizer steps after the growth")
        panel.set_ylabel("training loss, nats/token")
    panels[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()


def page(bench: Bench) -> str:
    """The document; what is between its marks is written by hand and stays."""
    parts = [f"| growth | {' | '.join(PARTS)} |", f"|{'---|' * (len(PARTS) + 1)}"]
    parts += [f"| `{case.title}` | {' | '.join(agreement(bench, case))} |" for case in CASES]
    tables = {
        "AGREEMENT": "\n".join(parts),
        "FIRST": rows(lambda run: statistics.mean(bench.losses(run)[:20])),
        "ALL": rows(lambda run: statistics.mean(bench.losses(run))),
        "HELD_OUT": rows(bench.held_out),
    }
    text = PAGE.read_text(encoding="utf-8")
    for name, table in tables.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        text = text[: text.index(begin) + len(begin)] + table + "\n" + text[text.index(end) :]
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "runs/optimizer-state", help="where runs are kept")
    parser.add_argument("--limit-s", type=float, default=float("inf"), help="begin no run after so many seconds")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    bench, began = Bench(arguments.work), time.monotonic()
    for seed in SEEDS:
        for case in CASES:
            for warmup in case.warmups:
                for state in STATES:
                    if time.monotonic() - began > arguments.limit_s:
                        raise SystemExit(f"stopped after {arguments.limit_s:.0f} s; run it again to go on")
                    bench.run(Run(case, seed, state, warmup))
    PAGE.write_text(page(bench), encoding="utf-8")
    title = "Training loss in the first steps after a growth, with grown and with reset moments"
    FIGURE.write_text(
        canvas.Drawing("optimizer-state", title, partial(draw, bench), (11.0, 3.4)).svg(), encoding="utf-8"
    )
    print(f"{PAGE.relative_to(ROOT)}, {FIGURE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
