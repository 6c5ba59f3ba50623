import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import cache, partial
from pathlib import Path
from typing import Any

import hydra
import pytest
from absl import logging as absl_logging
from hydra.core.global_hydra import GlobalHydra
from hypothesis import HealthCheck, settings
from omegaconf import OmegaConf

import ambush as ambushes
from aquilamoe.config.schema import ModelConfig
from browser import Browser, missing
from process_state import ProcessState, begin
from query_boards import plain

# torch computes on one thread, here and in commands, whatever the machine has: small tensors gain nothing by more, and
# sums are in one order. Who is the first to import torch reads it.
os.environ["OMP_NUM_THREADS"] = "1"

# A machine that is busy takes its time over an example, and over drawing it.
settings.register_profile("patient", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")
# So does Ray's dashboard when it starts, for which Ray waits a minute.
os.environ["RAY_DASHBOARD_STARTUP_TIMEOUT_S"] = "600"

# grain logs by absl, which closes the stream that it found first when Hydra configures logging: not pytest's.
absl_logging.get_absl_handler().python_handler.stream = sys.__stderr__

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
        "+experiment": "demo_text",
        "name": "embedded",
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


@pytest.fixture(scope="session")
def finished_store(
    tmp_path_factory: pytest.TempPathFactory, tiny: list[str], compose: Callable[..., dict[str, Any]]
) -> Path:
    """The root of the tiny experiment, run once in this process, untracked. Tests that change it take a copy."""
    from aquilamoe.cli import commands

    root = tmp_path_factory.mktemp("finished") / "runs"
    commands.execute(compose(*tiny, f"paths.root={root}", "tracking.enabled=false"), "")
    return root


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Iterator[Any]:
    """A test finds this process as the first one found it, whatever programs others have run in it."""
    state = ProcessState.now()
    begin()
    result = yield
    state.restore()
    return result


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any]) -> Iterator[Any]:
    """So does a test behind a fixture that has run a program, once, for several tests."""
    state = ProcessState.now()
    try:
        return (yield)
    finally:
        if fixturedef.scope != "function":
            state.restore()


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """One Chromium for all pages that tests look at."""
    if reason := missing():
        pytest.skip(reason)
    with Browser() as found:
        yield found


@pytest.fixture(scope="session")
def command() -> Command:
    """Run `python workflows/efficientscale.py` in a process of its own."""

    def run(*words: str, cwd: Path, python: tuple[str, ...] = (), **changes: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, *python, str(REPOSITORY / "workflows" / "efficientscale.py"), *words],
            cwd=cwd,
            env=os.environ | changes,
            capture_output=True,
            text=True,
        )

    return run


@pytest.fixture(scope="session")
def ambush(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, str]]:
    """Environment in which a process is killed, or waits, when it touches a path that matches: `ambush.environment`."""
    folder = tmp_path_factory.mktemp("ambush")
    ambushes.prepare(folder)
    return partial(ambushes.environment, folder)


@pytest.fixture(scope="session")
def plain_query() -> Callable[[str], str]:
    """A query of a board as Prometheus knows it: with what Grafana puts in the place of its variables."""
    return plain


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
    """The names of all metrics that Grafana's boards query."""
    boards = [
        json.loads(path.read_text()) for path in (REPOSITORY / "dashboards" / "grafana" / "boards").glob("*.json")
    ]
    targets = [target for board in boards for panel in board["panels"] for target in panel.get("targets", [])]
    return set[str]().union(*(metrics_of(target["expr"]) for target in targets))
