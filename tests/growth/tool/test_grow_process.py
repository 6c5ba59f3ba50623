"""The growth tool as a user types it, in processes of its own: spellings, plans without torch, kills, and Ctrl-C."""

import hashlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from aquilamoe.checkpoint import hf_config, sharding, tensor_names
from aquilamoe.checkpoint.state_dict import save_model
from aquilamoe.config.schema import ModelConfig
from aquilamoe.growth.tool.output import RUN, locked
from aquilamoe.model.transformer import Decoder
from waiting import PATIENCE_S, until

pytestmark = pytest.mark.process

WORKFLOW = Path(__file__).resolve().parents[3] / "workflows" / "grow.py"
HEAVY = {"torch", "transformers", "tokenizers", "pyarrow", "safetensors", "ray", "mlflow"}
FPI = (
    *("growth=fpi", "growth.norm=exact", "growth.noise=0.5", "growth.depth=interpolate", "growth.new_layers=zero"),
    *("model.hidden_size=40", "model.num_hidden_layers=4", "certificate.tokens=64"),
)
AKI_PRO = (
    *("growth=aki_pro", "model.hidden_size=5120", "model.num_hidden_layers=40", "model.intermediate_size=20480"),
    "model.num_attention_heads=40",
)
COPY = ("upcycling=copy", "model.num_experts=8", "model.num_experts_per_tok=2")

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rope_theta": 10_000.0,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.2,
    "qkv_bias": True,
    "tie_word_embeddings": False,
    "qk_norm": "none",
    "num_experts": 0,
    "num_experts_per_tok": 0,
    "moe_intermediate_size": 0,
    "shared_expert_intermediate_size": 0,
    "norm_topk_prob": True,
    "mlp_only_layers": [],
}
PAPER_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 151_851,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
    "rope_theta": 1_000_000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}

Command = Callable[..., "subprocess.CompletedProcess[str]"]
Ambush = Callable[..., dict[str, str]]


@pytest.fixture(scope="module")
def grow() -> Command:
    """Run `python workflows/grow.py`."""

    def run(*words: str, cwd: Path, python: tuple[str, ...] = (), **changes: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, *python, str(WORKFLOW), *words],
            cwd=cwd,
            env=os.environ | changes,
            capture_output=True,
            text=True,
        )

    return run


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, grow: Command) -> Path:
    """A folder with a small checkpoint `source` and what became of it, `target`; not to be changed."""
    folder = tmp_path_factory.mktemp("base")
    config = ModelConfig.model_validate(SMALL)
    model = Decoder(config)
    model.initialize(0)
    save_model(model, folder / "source", dtype=torch.float32)
    completed = grow("source=source", "target=target", *FPI, cwd=folder)
    assert (completed.returncode, completed.stderr) == (0, "")
    (folder / "stdout").write_text(completed.stdout)
    return folder


@pytest.fixture
def workplace(base: Path, tmp_path: Path) -> Path:
    """A folder with the source alone."""
    shutil.copytree(base / "source", tmp_path / "source")
    return tmp_path


def holes(folder: Path, config: dict[str, Any]) -> None:
    """A source of headers, and holes for tensors."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    shapes = tensor_names.tensor_shapes(hf_config.read_config(folder))
    shards = sharding.plan_shards(shapes, "BF16", 5 * 10**9)
    for shard in shards:
        with (folder / shard.file).open("wb") as file:
            file.write(shard.header)
            file.truncate(shard.size)
    index = sharding.index(shards, shapes, "BF16")
    if index is not None:
        (folder / "model.safetensors.index.json").write_bytes(index)


SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rope_theta": 100_000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
SMOLLM2_WIDER = {
    "hidden_size": 720,
    "intermediate_size": 1920,
    "num_hidden_layers": 40,
    "num_attention_heads": 12,
    "head_dim": 64,
}


def documented() -> list[str]:
    """The growth commands that the documentation shows."""
    pages = [WORKFLOW.parent.parent / page for page in ("README.md", "docs/growing-your-own-checkpoint.md")]
    lines = [line.strip() for page in pages for line in page.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line.startswith("python workflows/grow.py ") and "certify" not in line]


def reads_weights(line: str) -> bool:
    """Whether the plan of a command needs the weights, not headers alone."""
    return "shrink=" in line


def test_the_documentation_has_growth_commands() -> None:
    assert len(documented()) >= 6


@pytest.mark.parametrize("line", [line for line in documented() if reads_weights(line)])
def test_every_shrink_of_the_documentation_is_complete_but_for_its_source(
    line: str, grow: Command, tmp_path: Path
) -> None:
    completed = grow(*shlex.split(line)[2:], "action=plan", cwd=tmp_path)
    assert completed.returncode == 1
    assert completed.stderr.endswith("no such directory; name a directory with a Hugging Face checkpoint\n")


@pytest.mark.parametrize("line", [line for line in documented() if not reads_weights(line)])
def test_every_growth_command_of_the_documentation_has_a_plan(line: str, grow: Command, tmp_path: Path) -> None:
    holes(tmp_path / "DIR", PAPER_7B)
    holes(tmp_path / "runs/smollm2/smollm2-135m", SMOLLM2)
    holes(tmp_path / "runs/smollm2/smollm2-256m", SMOLLM2 | SMOLLM2_WIDER)
    words = [word.replace("target=DIR", "target=new") for word in shlex.split(line)[2:] if word != "action=plan"]
    completed = grow(*words, "action=plan", cwd=tmp_path)
    assert (completed.returncode, completed.stderr) == (0, "")
    assert "Only headers and config.json were read; nothing was started." in completed.stdout


def digests(directory: Path) -> dict[str, str]:
    """SHA-256 of everything that a target is, all but how long it took."""
    paths = (path for path in sorted(directory.rglob("*")) if path.name != RUN)
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def imported(completed: "subprocess.CompletedProcess[str]") -> set[str]:
    """Packages that a command run with `-X importtime` imported."""
    lines = [line for line in completed.stderr.splitlines() if line.startswith("import time:")]
    modules = {line.rpartition("|")[2].strip() for line in lines}
    assert "aquilamoe.cli.grow" in modules
    return {module.partition(".")[0] for module in modules}


def test_a_run_prints_what_it_did_and_warns_of_nothing(base: Path) -> None:
    stdout = (base / "stdout").read_text()
    assert re.search(r"^  grow +\d.*/s, on disk$", stdout, re.MULTILINE)
    assert re.search(r"^target +Qwen2 +4 +40 +6/2 ", stdout, re.MULTILINE)
    assert "random ids, the source has no tokenizer.json" in stdout
    assert stdout.endswith(": target\n")
    assert {path.name for path in base.iterdir()} == {"source", "target", "stdout"}


def test_the_same_command_again_is_cached_without_torch(base: Path, grow: Command) -> None:
    before = digests(base / "target")
    completed = grow("source=source", "target=target", *FPI, cwd=base, python=("-X", "importtime"))
    assert completed.returncode == 0
    assert completed.stdout.startswith("cached: target is complete")
    assert imported(completed) & HEAVY == set()
    assert digests(base / "target") == before


def test_copies_without_a_certificate_are_made_without_torch(workplace: Path, grow: Command) -> None:
    words = ("source=source", "target=target", *COPY, "certificate.enabled=false")
    completed = grow(*words, cwd=workplace, python=("-X", "importtime"))
    assert completed.returncode == 0, completed.stderr
    assert imported(completed) & HEAVY == set()
    assert (workplace / "target" / "model.safetensors").is_file()


@pytest.mark.parametrize("words", [AKI_PRO, COPY], ids=["growth", "upcycling"])
def test_the_plan_of_the_papers_growths_reads_headers_alone_and_imports_nothing_heavy(
    words: tuple[str, ...], grow: Command, tmp_path: Path
) -> None:
    holes(tmp_path / "7b", PAPER_7B)
    completed = grow("source=7b", "target=16b", *words, "action=plan", cwd=tmp_path, python=("-X", "importtime"))
    assert completed.returncode == 0
    assert [line for line in completed.stderr.splitlines() if not line.startswith("import time:")] == []
    assert imported(completed) & HEAVY == set()
    assert "8.22B" in completed.stdout
    assert ("16.7B" if words is AKI_PRO else "mlp.experts.0-7.up_proj.weight") in completed.stdout
    assert len(completed.stdout.splitlines()) < 50
    assert [path.name for path in tmp_path.iterdir()] == ["7b"]


def test_the_full_plan_has_a_line_for_every_tensor(grow: Command, tmp_path: Path) -> None:
    holes(tmp_path / "7b", PAPER_7B)
    completed = grow("source=7b", "target=16b", *AKI_PRO, "action=plan", "plan=full", cwd=tmp_path)
    for layer in range(40):
        assert f"model.layers.{layer}.self_attn.q_proj.weight " in completed.stdout
    assert re.search(
        r"model.layers.1.self_attn.q_proj.weight +5120 x 5120 +model.layers.0.self_attn.q_proj.weight \+ "
        r"model.layers.1.self_attn.q_proj.weight",
        completed.stdout,
    )


def test_a_group_is_chosen_with_or_without_a_plus_and_a_path_may_have_any_characters(
    grow: Command, workplace: Path
) -> None:
    odd = "it's, a {model}=${x} [bold]"
    (workplace / "source").rename(workplace / odd)
    shown = [
        grow(
            f"source={odd}",
            f"target={odd} 2",
            f"{plus}growth=fpi",
            "model.hidden_size=40",
            "action=plan",
            cwd=workplace,
        )
        for plus in ("", "+")
    ]
    assert [(completed.returncode, completed.stderr) for completed in shown] == [(0, "")] * 2
    without_plus, with_plus = (re.sub(r"\S+ \S+ are free", "", completed.stdout) for completed in shown)
    assert without_plus == with_plus
    assert odd in shown[0].stdout


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("source=source",), "error: target: required but not set; name the directory to make, target=DIR"),
        (("source=source", "target=t"), "error: growth: none of growth, upcycling and shrink is named; "),
        (("source=source", "target=t", *FPI, *COPY), "error: growth, upcycling: both are named, "),
        (
            ("source=source", "target=t", "growth=fpy"),
            "error: growth=fpy: there is no conf/growth/fpy.yaml; did you mean",
        ),
        (
            ("source=source", "target=t", "growth.norm=exact"),
            "error: growth.norm: exact of no growth; name one, e.g. growth=fpi",
        ),
        (
            ("source=source", "target=t", *FPI, "model.hiden_size=4"),
            "error: model.hiden_size: unknown key; did you mean",
        ),
        (("source=nowhere", "target=t", *FPI), "error: source: "),
    ],
    ids=lambda value: " ".join(value)[-30:] if isinstance(value, tuple) else "",
)
def test_a_mistake_on_the_command_line_is_one_line(
    words: tuple[str, ...], line: str, grow: Command, workplace: Path
) -> None:
    completed = grow(*words, cwd=workplace)
    assert (completed.returncode, completed.stdout) == (1, "")
    assert completed.stderr.startswith(line)
    assert completed.stderr.count("\n") == 1
    assert [path.name for path in workplace.iterdir()] == ["source"]


def test_a_run_killed_at_many_points_leaves_nothing_or_the_whole_and_ends_with_the_same_bytes(
    base: Path, workplace: Path, grow: Command, ambush: Ambush
) -> None:
    words, expected = ("source=source", "target=target", *FPI), digests(base / "target")
    for path, times in (
        (r"target\.partial$", 1),  # before there is a directory
        (r"target\.partial/\.lock", 1),
        (r"target\.partial/model\.safetensors", 1),  # in the growth
        (r"target\.partial/tokenizer|target\.partial/config\.json", 1),
        (r"target\.partial/\.grown\.json", 3),  # the weights are complete
        (r"target\.partial/README\.md", 1),
        (r"target\.partial/record\.json", 1),
        (r"/target$", 1),  # at its name
    ):
        killed = grow(*words, cwd=workplace, **ambush(path, "kill", times))
        assert killed.returncode == -signal.SIGKILL, (path, killed.stdout, killed.stderr)
        assert not (workplace / "target").exists()
    completed = grow(*words, cwd=workplace)
    assert (completed.returncode, completed.stderr) == (0, "")
    assert digests(workplace / "target") == expected
    assert {path.name for path in workplace.iterdir()} == {"source", "target"}


def test_a_run_killed_wherever_it_touches_a_file_leaves_nothing_or_the_whole(
    base: Path, workplace: Path, grow: Command, ambush: Ambush
) -> None:
    words, expected, draw = ("source=source", "target=target", *FPI), digests(base / "target"), random.Random(0)
    for times in (draw.randint(1, 15), draw.randint(16, 30), draw.randint(31, 40), 46):  # of the 46 of a whole run
        killed = grow(*words, cwd=workplace, **ambush(r"/target(\.partial)?(/|$)", "kill", times))
        assert killed.returncode in (0, -signal.SIGKILL), killed.stderr  # one that resumes touches fewer
        if (workplace / "target").exists():
            assert digests(workplace / "target") == expected
            shutil.rmtree(workplace / "target")
    assert (grow(*words, cwd=workplace).returncode, digests(workplace / "target")) == (0, expected)


def test_ctrl_c_is_one_line_and_leaves_nothing(
    workplace: Path, ambush: Ambush, tmp_path_factory: pytest.TempPathFactory
) -> None:
    trap = tmp_path_factory.mktemp("trap") / "sprung"
    process = subprocess.Popen(
        [sys.executable, str(WORKFLOW), "source=source", "target=target", *FPI],
        cwd=workplace,
        env=os.environ | ambush(r"target\.partial/config\.json", str(trap)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    until(trap.exists, process)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
    assert stderr == "\ninterrupted; nothing was kept; the same command starts over\n"
    assert [path.name for path in workplace.iterdir()] == ["source"]


def test_a_second_run_to_the_same_target_ends_in_one_line(workplace: Path, grow: Command) -> None:
    with locked(workplace / "target"):
        completed = grow("source=source", "target=target", *FPI, cwd=workplace)
    assert (completed.returncode, completed.stdout) == (1, "")
    assert re.fullmatch(
        rf"error: {workplace}/target\.partial: in use by process {os.getpid()} since .*; wait for it, or name another "
        r"target\n",
        completed.stderr,
    )
    assert [path.name for path in workplace.iterdir()] == ["source"]
