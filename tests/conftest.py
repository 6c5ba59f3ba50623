import json
import math
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from aquilamoe.ablation.judgement import horizon_of, judge, leaders_of
from aquilamoe.config.schema import ModelConfig
from aquilamoe.reports.study import Ancestor, Control, Entry, Seed, Study
from browser import Browser, missing

REPOSITORY = Path(__file__).resolve().parent.parent
SYLLABLES = {
    "en": ["the ", "mo", "ther ", "of ", "ri", "ver", "s ", "and ", "gar", "den", "s, ", "walk", "ed ", "home. "],
    "zh": list("天下大势分久必合分。水流花开山高月小"),
}
TRAINING = {
    "batch_tokens": 256,
    "sequence_length": 32,
    "validation_tokens": 512,
    "validate_every_tokens": 1024,
    "precision": "fp32",
    "schedule.warmup_tokens": 512,
    "schedule.decay_tokens": 512,
}

# Small networks of every architecture, each with what only it has; every size differs from every other.
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
NETWORKS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_attention_heads": 10},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": "head"},
    "mixtral": EXPERTS,
    "qwen2_moe": {**EXPERTS, "qkv_bias": True},
    "qwen2_moe shared": {
        **EXPERTS,
        "qkv_bias": True,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 28,
        "norm_topk_prob": False,
        "mlp_only_layers": (1,),
    },
    "qwen3_moe": {**EXPERTS, "qk_norm": "head", "moe_intermediate_size": 16, "mlp_only_layers": (0,)},
    "olmoe": {**EXPERTS, "qk_norm": "projection", "head_dim": 6, "norm_topk_prob": False},
}

Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session", params=NETWORKS)
def kind(request: pytest.FixtureRequest) -> str:
    """Every kind of network that `network` makes, one after the other."""
    return str(request.param)


@pytest.fixture(scope="session")
def network() -> Callable[..., ModelConfig]:
    """A small network: `network("qwen3", hidden_size=64)`; its heads together are wider than the hidden size."""

    def build(kind: str, **changes: Any) -> ModelConfig:
        values = {
            "vocab_size": 50,
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 64,
            "rope_theta": 5e3,
            "rms_norm_eps": 1e-3,
            "initializer_range": 0.2,
            "qkv_bias": False,
            "tie_word_embeddings": False,
            "num_experts": 0,
            "num_experts_per_tok": 0,
        }
        return ModelConfig.model_validate(values | NETWORKS[kind] | changes)

    return build


@pytest.fixture(scope="session")
def compose() -> Callable[..., dict[str, Any]]:
    """Compose the configuration as the command does, with overrides: `compose("growth=fpi")`."""

    @cache
    def composed(overrides: tuple[str, ...]) -> dict[str, Any]:
        GlobalHydra.instance().clear()
        with hydra.initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
            values = OmegaConf.to_container(hydra.compose("config", list(overrides)), resolve=True)
        assert isinstance(values, dict)
        return {str(key): value for key, value in values.items()}

    return lambda *overrides: deepcopy(composed(overrides))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that cut the embedded experiment to a few seconds: invented text, toy sizes, one thread, no Ray."""
    folder, draw = tmp_path_factory.mktemp("corpus"), random.Random(0)
    for language, syllables in SYLLABLES.items():
        documents = [
            {"text": "".join(draw.choices(syllables, k=300)), "split": "train" if index % 4 else "validation"}
            for index in range(24)
        ]
        (folder / f"{language}.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    values: dict[str, Any] = {
        **{f"data.sources.{language}.path": folder / f"{language}.jsonl" for language in SYLLABLES},
        **{f"data.sources.{language}.sha256": "null" for language in SYLLABLES},
        "cluster": "local_process",
        "cluster.cpus_per_worker": 1,
        "cluster.checkpoint_every_tokens": 512,
        "model.vocab_size": 320,
        "model.hidden_size": 16,
        "model.intermediate_size": 32,
        "model.num_hidden_layers": 2,
        "model.num_attention_heads": 2,
        "model.num_key_value_heads": 1,
        "model.max_position_embeddings": 64,
        "stages.tokenizer.vocab_size": 300,
        **{
            f"stages.{s}.{key}": value
            for s in ("prepare", "dense", "moe", "control")
            for key, value in TRAINING.items()
        },
        "stages.prepare.total_tokens": 4096,
        "stages.dense.total_tokens": 2048,
        "stages.moe.total_tokens": 2048,
        "stages.scale_up.model.hidden_size": 24,
        "stages.scale_up.model.intermediate_size": 48,
        "stages.scale_up.model.num_hidden_layers": 3,
        "stages.scale_up.model.num_attention_heads": 3,
        "stages.scale_up.certificate_tokens": 256,
        "stages.scale_out.model.num_experts": 4,
        "stages.scale_out.certificate_tokens": 256,
        "stages.evaluate.sequence_length": 32,
    }
    return [f"{key}={value}" for key, value in values.items()]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch computes on one thread: small tensors gain nothing by more, and sums are in one order."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """One Chromium for all pages that tests look at."""
    if reason := missing():
        pytest.skip(reason)
    with Browser() as found:
        yield found


@pytest.fixture(scope="session")
def invent() -> Callable[..., Study]:
    """A study of invented numbers: `invent(ends={"fpi": 3.3, "aki": 3.2}, noise=0.01)`; the first is the baseline.

    ends, starts: held-out losses of every variant; tokens: of its stage, if not a million. continued, scratch: what the
    controls of equal FLOPs end with, the latter by ratio of learning rates. failed: variants without a result, and why.
    """

    def invented(
        ends: dict[str, float],
        starts: dict[str, float] = {},  # noqa: B006
        tokens: dict[str, int] = {},  # noqa: B006
        noise: float = 0.01,
        seeds: tuple[int, ...] = (1, 2, 3),
        continued: float | None = 3.4,
        scratch: dict[float, float] = {},  # noqa: B006
        failed: dict[str, str] = {},  # noqa: B006
        baseline: str | None = None,
        source: tuple[int, int] = (450_000, 2_000_000),
    ) -> Study:
        draw = random.Random(0)

        def seed(
            start: float, end: float, tokens: int, flops_per_token: float, grown: bool, steep: float = 4.0
        ) -> Seed:
            shift, curve = draw.gauss(0, noise), []
            for index in range(21):
                share = (math.exp(-steep * index / 20) - math.exp(-steep)) / (1 - math.exp(-steep))
                at = tokens * index // 20
                flops = (source[1] * 2.7e6 if grown else 0.0) + at * flops_per_token
                curve.append((float(at), flops, end + (start - end) * share + shift))
            jump = {"loss_source": 3.6, "loss_grown": start, "loss_jump": start - 3.6, "kl": 0.1, "rank_grown": 0.6}
            return Seed(
                fingerprint=f"{draw.getrandbits(48):012x}",
                value=curve[-1][2],
                loss=curve[-1][2],
                tokens=tokens,
                flops=tokens * flops_per_token,
                lineage_tokens=tokens + (source[1] if grown else 0),
                lineage_flops=curve[-1][1],
                ancestors=["source"] if grown else [],
                figures={**jump, "rank_end": 0.7, "recovery_tokens": 2e5, "recovery_flops": 2e12} if grown else {},
                curve=curve,
            )

        def entry(name: str, control: Control | None, values: dict[int, Seed], missing: dict[int, str]) -> Entry:
            return Entry(
                name=name,
                axes={} if control else {"method": name},
                control=control,
                params_total=1_630_000,
                params_active=1_630_000,
                learning_rate=1e-3,
                seeds=values,
                missing=missing,
            )

        def control(of: str | None, ratio: float, end: float) -> Entry:
            kind = f"continued_{of}_flops" if of else "scratch_flops"
            known = Control(
                kind=kind, of=of, equal="flops", learning_rate_ratio=ratio, best=False, stands_for=names, differences={}
            )
            # As many FLOPs as the variants' lines, from the source on or from nothing.
            budget, per_token = (9.8e12, 2.7e6) if of else (9.8e12 + source[1] * 2.7e6, 9.8e6)
            length = round(budget / per_token)
            values = {n: seed(3.6 if of else 8.0, end, length, per_token, of is not None) for n in seeds}
            return entry(f"{kind}_x{ratio:g}", known, values, {})

        names = [*ends, *failed]
        entries = [
            entry(
                name,
                None,
                {n: seed(starts.get(name, 3.9), end, tokens.get(name, 1_000_000), 9.8e6, True) for n in seeds},
                {},
            )
            for name, end in ends.items()
        ]
        entries += [entry(name, None, {}, dict.fromkeys(seeds, reason)) for name, reason in failed.items()]
        entries += [control("prepare", 1.0, continued)] if continued is not None else []
        entries += [control(None, ratio, end) for ratio, end in scratch.items()]
        judged = judge(entries, baseline or names[0])
        variants = [each for each in judged if each.control is None]
        params, length = source
        start = [(length * 2.7e6 * index / 20, 3.6 + 4 * math.exp(-index / 3)) for index in range(21)]
        return Study(
            name="ablation_invented",
            description="Invented numbers.",
            command="python workflows/ablations.py +ablation=invented",
            objective={"stage": "dense", "metric": "loss_end"},
            axes={"method": names},
            baseline=baseline or names[0],
            seeds=list(seeds),
            horizon=horizon_of(variants, baseline or names[0]),
            ancestors={
                "source": Ancestor(
                    stage="prepare",
                    params=params,
                    learning_rate=3e-3,
                    tokens=length,
                    flops=length * 2.7e6,
                    loss=start[-1][1],
                    curve=start,
                )
            },
            entries=judged,
            leaders=leaders_of(variants),
        )

    return invented


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """For commands: one thread, whatever the machine has."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def command(environment: dict[str, str]) -> Command:
    """Run `python workflows/efficientscale.py` in a process of its own."""

    def run(*words: str, cwd: Path, python: tuple[str, ...] = (), **changes: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, *python, str(REPOSITORY / "workflows" / "efficientscale.py"), *words],
            cwd=cwd,
            env=environment | changes,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


@pytest.fixture(scope="session")
def plain_query() -> Callable[[str], str]:
    """A query of a board as Prometheus knows it: with what Grafana puts in the place of its variables."""
    return lambda query: re.sub(r"\$\w+", ".*", query.replace("$__rate_interval", "1m"))


@pytest.fixture(scope="session")
def metrics_of(plain_query: Callable[[str], str]) -> Callable[[str], set[str]]:
    """The names of the metrics in a query: what is left without labels, ranges, functions and their words."""

    def names(query: str) -> set[str]:
        text = re.sub(r"\{.*?\}|\[.*?\]", " ", plain_query(query))
        text = re.sub(r"\b(by|without|on|ignoring|group_left|group_right)\s*(\(.*?\))?", " ", text)
        return set(re.findall(r"\b[a-z_][a-z0-9_]*\b(?!\s*\()", text))

    return names


@pytest.fixture(scope="session")
def queried_metrics(metrics_of: Callable[[str], set[str]]) -> set[str]:
    """The names of all metrics that Grafana's boards ask for."""
    boards = [
        json.loads(path.read_text()) for path in (REPOSITORY / "dashboards" / "grafana" / "boards").glob("*.json")
    ]
    targets = [target for board in boards for panel in board["panels"] for target in panel.get("targets", [])]
    return set[str]().union(*(metrics_of(target["expr"]) for target in targets))
