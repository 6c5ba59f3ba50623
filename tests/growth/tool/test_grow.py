"""The growth tool in this process: sources of every architecture, what a target holds, and what is refused."""

import errno
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import CancelledError
from contextlib import redirect_stdout
from copy import deepcopy
from functools import cache
from pathlib import Path
from threading import Event
from typing import Any

import hydra
import pytest
import torch
from huggingface_hub import ModelCard
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from aquilamoe.checkpoint import safetensors_header
from aquilamoe.checkpoint.raw_reader import RawReader
from aquilamoe.cli import grow as grow_command
from aquilamoe.config.messages import UserError
from aquilamoe.format import size
from aquilamoe.growth.tool import comparison, identity, making, output
from aquilamoe.growth.tool.output import RECORD, RUN
from aquilamoe.process.errors import described

CONF = Path(__file__).resolve().parents[3] / "conf"
SHAPE: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
# Source by name: model type, what differs from SHAPE, type of the weights, size of its files.
SOURCES: dict[str, tuple[str, dict[str, Any], torch.dtype, str]] = {
    "llama": ("llama", {}, torch.float32, "1GB"),
    "llama tied bf16 sharded": ("llama", {"tie_word_embeddings": True}, torch.bfloat16, "12KB"),
    "mistral fp16": ("mistral", {"sliding_window": None}, torch.float16, "1GB"),
    "qwen2": ("qwen2", {}, torch.float32, "1GB"),
    "qwen3": ("qwen3", {"head_dim": 16}, torch.float32, "20KB"),
    "mixtral": (
        "mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
        torch.float32,
        "",
    ),
    "qwen2_moe": (
        "qwen2_moe",
        {**EXPERTS, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24, "norm_topk_prob": True},
        torch.float32,
        "1GB",
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {**EXPERTS, "moe_intermediate_size": 16, "head_dim": 16, "norm_topk_prob": True, "mlp_only_layers": [1]},
        torch.float32,
        "1GB",
    ),
    "olmoe": ("olmoe", {**EXPERTS, "norm_topk_prob": False}, torch.bfloat16, "1GB"),
}
DENSE = [name for name, (_, changes, *_) in SOURCES.items() if not any("experts" in key for key in changes)]
LARGER = [
    "model.hidden_size=40",
    "model.intermediate_size=72",
    "model.num_attention_heads=6",
    "model.num_hidden_layers=5",
]
FPI = ["growth=fpi", "growth.new_layers=zero", *LARGER]
COPY = ["upcycling=copy", "model.num_experts=4", "model.num_experts_per_tok=2"]
Grow = Callable[..., str]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint of a name in SOURCES, as transformers saves it; not to be changed."""
    folder = tmp_path_factory.mktemp("sources")

    @cache
    def saved(name: str) -> Path:
        model_type, changes, dtype, shard = SOURCES[name]
        directory = folder / name.replace(" ", "-")
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SHAPE | changes)).to(dtype)
        with torch.no_grad():  # gains that are all 1 would hide what is done to them
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.rand_like(parameter) * 0.5)
        model.save_pretrained(directory, max_shard_size=shard or "50KB")
        tokenizer().save_pretrained(directory)
        (directory / "README.md").write_text(
            "---\nlicense: apache-2.0\nlanguage:\n- en\n- zh\ntags:\n- x\n---\n# small\n"
        )
        (directory / "LICENSE").write_text("Apache License\n")
        return directory

    return saved


def tokenizer(first: int = 0) -> PreTrainedTokenizerFast:
    """Every byte is a token; ids begin at `first`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(
        models.BPE(vocab={character: index for index, character in enumerate(alphabet, first)}, merges=[])
    )
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=plain)


@cache
def composed(words: tuple[str, ...]) -> dict[str, Any]:
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        prefixed = ["+" + word if word.startswith(("growth=", "upcycling=", "shrink=")) else word for word in words]
        values = OmegaConf.to_container(hydra.compose("grow", prefixed), resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


@pytest.fixture(scope="module")
def grow() -> Grow:
    """Do what the command does with these words, in this process; return what it prints."""

    def run(source: Path, target: Path, *words: str) -> str:
        values = deepcopy(composed(("certificate.tokens=256", "certificate.sequence_length=32", *words)))
        values |= {"source": str(source), "target": str(target)}
        shown = io.StringIO()
        with redirect_stdout(shown):
            grow_command.execute(values, f"python workflows/grow.py source={source} target={target} {' '.join(words)}")
        return shown.getvalue()

    return run


@pytest.fixture(scope="module")
def grown(
    source: Callable[[str], Path], grow: Grow, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Path, Path]]:
    """A source and what became of it; not to be changed."""
    folder = tmp_path_factory.mktemp("targets")

    @cache
    def made(name: str, *words: str) -> tuple[Path, Path]:
        target = folder / hashlib.sha256(" ".join([name, *words]).encode()).hexdigest()[:12]
        grow(source(name), target, *words)
        return source(name), target

    return made


@torch.no_grad()
def logits(directory: Path) -> torch.Tensor:
    """What transformers computes, in float32."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    ids_bt = torch.randint(0, SHAPE["vocab_size"], (4, 24), generator=generator)
    return model(ids_bt).logits


def files(directory: Path) -> dict[str, bytes]:
    """Bytes of everything that a target is, all but how long it took."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != RUN}


def refusal(grow: Grow, *arguments: Any) -> str:
    with pytest.raises(UserError) as caught:
        grow(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def tolerance(name: str) -> float:
    return {torch.float32: 2e-4, torch.float16: 0.03, torch.bfloat16: 0.3}[SOURCES[name][2]]


@pytest.mark.parametrize("name", DENSE)
def test_a_preserving_growth_computes_in_transformers_what_its_source_computes(
    name: str, grown: Callable[..., tuple[Path, Path]]
) -> None:
    words = [word for word in FPI if name != "qwen3" or "num_attention_heads" not in word]
    before, after = grown(name, *words)
    torch.testing.assert_close(logits(after), logits(before), atol=tolerance(name), rtol=0)
    assert logits(before).std() > 0.3  # and that is something
    assert AutoConfig.from_pretrained(after).num_hidden_layers == 5


@pytest.mark.parametrize("name", DENSE)
def test_a_source_becomes_experts_that_compute_in_transformers_what_it_computes(
    name: str, grown: Callable[..., tuple[Path, Path]]
) -> None:
    before, after = grown(name, *COPY)
    torch.testing.assert_close(logits(after), logits(before), atol=tolerance(name), rtol=0)
    assert AutoConfig.from_pretrained(after).num_experts_per_tok == 2


@pytest.mark.parametrize("name", [name for name in SOURCES if name not in DENSE])
def test_experts_become_more_experts_that_compute_in_transformers_what_they_computed(
    name: str, grown: Callable[..., tuple[Path, Path]]
) -> None:
    before, after = grown(name, "upcycling=copy", "model.num_experts=8", "model.num_experts_per_tok=4")
    torch.testing.assert_close(logits(after), logits(before), atol=tolerance(name), rtol=0)


@pytest.mark.parametrize(
    ("words", "dense"),
    [
        (["upcycling.layers=every_other"], [0, 2]),
        (["upcycling.layers=[0,2]"], [1]),
        (["model.mlp_only_layers=[0]"], [0]),
        (["upcycling.layers=all", "model.shared_expert_intermediate_size=48"], []),
        (["model.moe_intermediate_size=24", "model.num_experts=8", "model.num_experts_per_tok=4"], []),
    ],
    ids=["every other", "a list", "dense ones", "shared expert", "fine-grained"],
)
def test_which_layers_become_experts_and_of_what_kind_is_free(
    words: list[str], dense: list[int], grown: Callable[..., tuple[Path, Path]]
) -> None:
    before, after = grown("qwen2", *COPY, *words)
    torch.testing.assert_close(logits(after), logits(before), atol=2e-4, rtol=0)
    assert AutoConfig.from_pretrained(after).mlp_only_layers == dense


def test_a_target_is_a_complete_directory(grown: Callable[..., tuple[Path, Path]]) -> None:
    before, after = grown("llama tied bf16 sharded", *FPI)
    assert {
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        *("LICENSE", "README.md", RECORD, RUN),
    } == {path.name for path in after.iterdir()}
    text = "To be, 或不是"
    assert AutoTokenizer.from_pretrained(after)(text).input_ids == AutoTokenizer.from_pretrained(before)(text).input_ids
    assert {info.dtype for info in safetensors_header.read(after).values()} == {"BF16"}
    assert not after.with_name(f"{after.name}.partial").exists()


def test_the_record_knows_every_tensor_and_every_file_of_the_source_by_its_bytes(
    grown: Callable[..., tuple[Path, Path]],
) -> None:
    before, after = grown("llama", *FPI)
    record = json.loads((after / RECORD).read_text())
    weights = (after / "model.safetensors").read_bytes()
    tensors = {
        name: hashlib.sha256(weights[info.start : info.end]).hexdigest()
        for name, info in safetensors_header.read(after).items()
    }
    assert record["tensors"] == tensors
    known = record["recipe"]["inputs"]["source"]
    assert known == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in before.iterdir()}
    assert record["certificate"]["max_abs_dlogit"] < 1e-4
    assert str(after.parent) not in (after / RECORD).read_text() + (after / "README.md").read_text()


def test_the_card_states_how_it_was_made_and_on_which_terms(grown: Callable[..., tuple[Path, Path]]) -> None:
    before, after = grown("llama", *FPI)
    card = (after / "README.md").read_text()
    header = card.split("---\n")[1]
    assert header.startswith(
        'license: apache-2.0\nlanguage:\n- en\n- zh\nbase_model: "llama"\nlibrary_name: transformers\n'
    )
    assert "- scale-up\n- fpi\n" in header
    assert "- x\n" not in header
    data: Any = ModelCard(card).data
    assert (data.license, data.language, data.base_model) == ("apache-2.0", ["en", "zh"], "llama")
    assert data.tags == ["efficientscale", "scale-up", "fpi"]
    assert f"python workflows/grow.py source=llama target={after.name} growth=fpi" in card
    assert "| largest difference of a logit | " in card
    assert hashlib.sha256((before / "model.safetensors").read_bytes()).hexdigest() in card
    assert "The terms of the source hold for what is grown from it" in card


def test_plan_and_card_state_what_grew_and_in_which_format_it_is_written(
    source: Callable[[str], Path], grow: Grow, tmp_path: Path
) -> None:
    wider = ["model.hidden_size=48", "model.intermediate_size=72"]
    layers = ["model.num_hidden_layers=4"]
    llama = "The source is a Llama, the target is written as a "
    for name, words, deed, remark in (
        ("llama", ["growth=fpi", *wider], "grown in width by `fpi` to ", ""),
        ("llama", ["growth=fpi", *layers], "grown in depth by `fpi` to ", ""),
        ("llama", ["growth=fpi", *layers, *wider], "grown in width and depth by `fpi` to ", ""),
        ("llama", ["growth=fpi", "model.vocab_size=300"], "grown in vocabulary by `fpi` to ", ""),
        ("llama", ["growth=fpi"], "copied in all its sizes by `fpi` to ", ""),
        ("llama", FPI, "grown in width and depth", f"{llama}Mistral: the same network, whose 6 heads do not divide"),
        ("llama", COPY, "upcycled to 4 experts", f"{llama}Mixtral: the format of transformers for these experts."),
        ("mistral fp16", ["growth=fpi", *layers], "grown in depth", ""),
        ("qwen3", ["growth=fpi", *layers], "grown in depth", ""),
    ):
        target = tmp_path / str(len(list(tmp_path.iterdir())))
        plan = grow(source(name), target, *words, "action=plan")
        grow(source(name), target, *words, "certificate.enabled=false")
        card = (target / "README.md").read_text()
        assert deed in card
        for text in (plan, card):
            assert remark in text
            assert bool(remark) == ("is written as a" in text)


def test_a_source_in_a_hubs_cache_goes_by_its_name_there(
    source: Callable[[str], Path], grow: Grow, tmp_path: Path
) -> None:
    snapshot = tmp_path / "models--owner--small-1B" / "snapshots" / "0123abcd"
    blobs = snapshot.parent.parent / "blobs"
    shutil.copytree(source("llama"), blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("..") / ".." / "blobs" / path.name)
    grow(snapshot, tmp_path / "target", *COPY, "certificate.enabled=false")
    card = (tmp_path / "target" / "README.md").read_text()
    assert ModelCard(card).data.to_dict()["base_model"] == "owner/small-1B"
    assert "source=owner/small-1B target=target upcycling=copy" in card
    assert not any(path.is_symlink() for path in (tmp_path / "target").iterdir())


HEADERS = {
    "none": ("", None),
    "without an end": ("---\nlicense: mit\n", None),
    "not YAML": ("---\nlicense: [a\nlanguage: 'en\n---\n", None),
    "of another system": ("---\r\nlicense: mit\r\n---\r\n", "mit"),
    "nested": ("---\nlicense:\n  x: 1\n---\n", None),
    "quoted": ('---\nlicense: "other"\nlicense_link: https://x.org/a#b\nlanguage: [en, zh]\n---\n', "other"),
}


@pytest.mark.parametrize(("header", "licence"), HEADERS.values(), ids=HEADERS)
def test_the_card_is_valid_whatever_the_sources_card_holds(
    header: str, licence: str | None, source: Callable[[str], Path], grow: Grow, tmp_path: Path
) -> None:
    shutil.copytree(source("llama"), tmp_path / "source")
    (tmp_path / "source" / "README.md").write_bytes(header.encode())
    grow(tmp_path / "source", tmp_path / "target", *COPY, "certificate.enabled=false")
    data: Any = ModelCard((tmp_path / "target" / "README.md").read_text()).data
    assert data.base_model == "source"
    assert data.license == licence
    assert getattr(data, "license_link", None) == ("https://x.org/a#b" if licence == "other" else None)


def test_the_same_again_is_cached_and_computes_nothing(
    grown: Callable[..., tuple[Path, Path]], grow: Grow, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = grown("llama", *FPI)
    held = files(after)
    monkeypatch.setattr(making.Making, "run", None)
    assert grow(before, after, *FPI).startswith("cached: ")
    assert files(after) == held


def test_another_recipe_or_another_source_is_refused_with_what_differs(
    grown: Callable[..., tuple[Path, Path]], grow: Grow, tmp_path: Path
) -> None:
    before, after = grown("llama", *FPI)
    held = files(after)
    line = refusal(grow, before, after, *FPI, "growth.noise=0.25", "seed=7")
    assert line.startswith(f"target: {after} was made by another recipe (growth.noise 0.5 -> 0.25; seed 1234 -> 7); ")
    trained = tmp_path / "trained"
    shutil.copytree(before, trained)
    weights = bytearray((trained / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (trained / "model.safetensors").write_bytes(weights)
    line = refusal(grow, trained, after, *FPI)
    assert "(inputs.source.model.safetensors has other bytes)" in line
    assert files(after) == held


def test_a_copy_of_the_source_under_another_path_is_the_same_source(
    grown: Callable[..., tuple[Path, Path]], grow: Grow, tmp_path: Path
) -> None:
    before, after = grown("llama", *FPI)
    shutil.copytree(before, tmp_path / "elsewhere")
    assert grow(tmp_path / "elsewhere", after, *FPI).startswith("cached: ")


def test_what_this_tool_did_not_make_is_never_touched(
    source: Callable[[str], Path], grow: Grow, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    for content in ("precious.txt", "record.json"):
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        (target / content).write_text("{}")
        assert "exists and is not a growth by this tool" in refusal(grow, source("llama"), target, *FPI)
        assert (target / content).read_text() == "{}"
    (tmp_path / "file").write_text("precious")
    assert "exists and is not a growth by this tool" in refusal(grow, source("llama"), tmp_path / "file", *FPI)
    partial = tmp_path / "new.partial"
    partial.mkdir()
    (partial / "precious.txt").write_text("x")
    assert refusal(grow, source("llama"), tmp_path / "new", *FPI).startswith(f"{partial}: ")
    assert (partial / "precious.txt").exists()


def test_a_damaged_target_is_not_taken_for_a_complete_one(
    grown: Callable[..., tuple[Path, Path]], grow: Grow, tmp_path: Path
) -> None:
    before, after = grown("llama", *FPI)
    damaged = tmp_path / "damaged"
    shutil.copytree(after, damaged)
    (damaged / "tokenizer.json").unlink()
    assert refusal(grow, before, damaged, *FPI).startswith(
        f"{damaged / 'tokenizer.json'}: is missing, its record states "
    )


def test_an_empty_directory_is_a_fine_target(source: Callable[[str], Path], grow: Grow, tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    grow(source("llama"), tmp_path / "target", *COPY, "certificate.enabled=false")
    assert (tmp_path / "target" / RECORD).exists()


def test_the_target_must_be_apart_from_the_source(source: Callable[[str], Path], grow: Grow, tmp_path: Path) -> None:
    original = tmp_path / "a.partial"
    shutil.copytree(source("llama"), original)
    held = files(original)
    for target in (original, tmp_path / "a", tmp_path, original / ".." / original.name):
        assert refusal(grow, original, target, *FPI).startswith("target: ")
    (tmp_path / "link").symlink_to(original)
    assert "is the source" in refusal(grow, original, tmp_path / "link", *FPI)
    assert files(original) == held


@pytest.mark.parametrize("free", [0, 50_000])
def test_a_disk_that_is_too_small_is_noticed_before_the_first_byte(
    free: int, source: Callable[[str], Path], grow: Grow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free))
    line = refusal(grow, source("llama"), tmp_path / "target", *FPI)
    assert line.startswith(f"target: {tmp_path / 'target'} needs 6")
    assert f" MB, {size(free)} are free on its disk; make room" in line
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_becomes_full_all_the_same_is_one_line_and_nothing_is_left(
    source: Callable[[str], Path], grow: Grow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(self: making.Making) -> None:
        (self.place.partial / "model.safetensors.partial").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(making.Making, "_grow_tensors", fill)
    with pytest.raises(OSError) as caught:
        grow(source("llama"), tmp_path / "target", *FPI)
    line = described(caught.value)
    assert line is not None
    assert line.startswith(f"{tmp_path / 'target'}: No space left on device, ") and " are free; make room" in line
    assert list(tmp_path.iterdir()) == []


def test_a_place_where_a_disk_is_mounted_is_no_target(source: Callable[[str], Path], grow: Grow) -> None:
    assert "/proc is where a disk is mounted" in refusal(grow, source("llama"), Path("/proc"), *FPI)
    assert "/ is the root of all directories" in refusal(grow, source("llama"), Path("/"), *FPI)


def test_hashing_a_large_source_ends_when_it_is_stopped(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 10)
    stop = Event()
    assert identity.digests([tmp_path / "file"], stop) == {"file": hashlib.sha256(b"x" * 10).hexdigest()}
    stop.set()
    with pytest.raises(CancelledError):
        identity.digests([tmp_path / "file"], stop)


def test_a_model_larger_than_the_disk_is_planned_and_refused_by_its_headers_alone(grow: Grow, tmp_path: Path) -> None:
    """A source of holes, as large as a real 70B: a reader of its tensors is still reading."""
    big = {
        **SHAPE,
        "vocab_size": 128_256,
        "hidden_size": 8192,
        "intermediate_size": 28_672,
        "head_dim": 128,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
    }
    directory = tmp_path / "big"
    write_holes(directory, {**big, "architectures": ["LlamaForCausalLM"], "model_type": "llama"})
    words = ["upcycling=copy", "model.num_experts=64", "model.num_experts_per_tok=2"]
    shown = grow(directory, tmp_path / "target", *words, "action=plan")
    assert "70.6B" in shown
    assert "mlp.experts.0-63.gate_proj.weight" in shown.replace("block_sparse_moe.", "mlp.").replace("w1", "gate_proj")
    assert len(shown.splitlines()) < 45
    line = refusal(grow, directory, tmp_path / "target", *words)
    assert line.startswith(f"target: {tmp_path / 'target'} needs 7.")
    assert not (tmp_path / "target").exists()


def write_holes(directory: Path, config: dict[str, Any]) -> None:
    from aquilamoe.checkpoint import hf_config, sharding, tensor_names

    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    shapes = tensor_names.tensor_shapes(hf_config.read_config(directory))
    for shard in sharding.plan_shards(shapes, "BF16", 10**13):
        with (directory / shard.file).open("wb") as file:
            file.write(shard.header)
            file.truncate(shard.size)


def damage_nothing(directory: Path) -> str:
    (directory / "config.json").unlink()
    return "config.json: no such file"


def damage_header(directory: Path) -> str:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return "model.safetensors: is damaged or cut short"


def damage_config(directory: Path) -> str:
    values = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**values, "intermediate_size": 64}))
    return "tensor 'model.layers.0.mlp.gate_proj.weight' has shape (48, 32), config.json declares (64, 32)"


def damage_layer(directory: Path) -> str:
    values = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**values, "num_hidden_layers": 4}))
    return "there is no tensor 'model.layers.3.input_layernorm.weight'"


def damage_tokenizer(directory: Path) -> str:
    (directory / "tokenizer.json").write_text("{")
    return "tokenizer.json: not a readable tokenizer"


def damage_number(directory: Path) -> str:
    path = directory / "model.safetensors"
    info = safetensors_header.read(directory)["model.layers.1.mlp.up_proj.weight"]
    data = bytearray(path.read_bytes())
    data[info.start : info.start + 4] = b"\xff\xff\xff\xff"
    path.write_bytes(data)
    return "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    "damage", [damage_nothing, damage_header, damage_config, damage_layer, damage_tokenizer, damage_number]
)
@pytest.mark.parametrize("words", [FPI, COPY], ids=["growth", "upcycling"])
def test_a_damaged_source_is_refused_by_name_and_leaves_nothing(
    damage: Callable[[Path], str], words: list[str], source: Callable[[str], Path], grow: Grow, tmp_path: Path
) -> None:
    shutil.copytree(source("llama"), tmp_path / "damaged")
    expected = damage(tmp_path / "damaged")
    assert expected in refusal(grow, tmp_path / "damaged", tmp_path / "target", *words)
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


def test_a_preserving_growth_that_misses_its_tolerance_is_not_published(
    source: Callable[[str], Path], grow: Grow, tmp_path: Path
) -> None:
    line = refusal(grow, source("llama"), tmp_path / "target", *FPI, "certificate.tolerance=1e-12")
    assert line.startswith("certificate: the growth claims to keep the function, but they diverge in ")
    assert list(tmp_path.iterdir()) == []


def test_a_growth_that_claims_nothing_is_published_with_what_was_measured(
    grown: Callable[..., tuple[Path, Path]],
) -> None:
    _, after = grown("llama", "growth=aki_pro", *LARGER)
    record = json.loads((after / RECORD).read_text())
    assert not record["preserving"]
    assert record["certificate"]["max_abs_dlogit"] > 0.1
    assert "does not claim to keep the function" in (after / "README.md").read_text()


def test_a_run_cut_off_in_its_certificate_continues_there_and_ends_with_the_same_bytes(
    grown: Callable[..., tuple[Path, Path]], grow: Grow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = grown("llama", *FPI)
    target = tmp_path / after.name

    def interrupt(*arguments: Any, **named: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(comparison, "compare", interrupt)
        with pytest.raises(KeyboardInterrupt, match="the same command continues with the certificate"):
            grow(before, target, *FPI)
    assert not target.exists()
    with monkeypatch.context() as patch:
        patch.setattr(making.Making, "_grow_tensors", None)
        assert "done by an earlier, interrupted run" in grow(before, target, *FPI)
    assert files(target) == files(after)
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


def test_what_another_recipe_left_unfinished_is_not_continued(
    grown: Callable[..., tuple[Path, Path]], grow: Grow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = grown("llama", *FPI)
    target = tmp_path / after.name

    def interrupt(*arguments: Any, **named: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(comparison, "compare", interrupt)
        with pytest.raises(KeyboardInterrupt):
            grow(before, target, *FPI, "growth.noise=0.125")
    assert "earlier run" not in grow(before, target, *FPI)
    assert files(target) == files(after)


def test_ctrl_c_during_the_growth_leaves_nothing(
    source: Callable[[str], Path], grow: Grow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(making.Making, "_grow_tensors", interrupt)
    with pytest.raises(KeyboardInterrupt, match="nothing was kept; the same command starts over"):
        grow(source("llama"), tmp_path / "target", *FPI)
    assert list(tmp_path.iterdir()) == []


def test_code_beside_the_source_is_left_there(source: Callable[[str], Path], grow: Grow, tmp_path: Path) -> None:
    original = tmp_path / "source"
    shutil.copytree(source("llama"), original)
    (original / "modeling_small.py").write_text("raise SystemExit('code of a checkpoint ran')\n")
    values = json.loads((original / "config.json").read_text())
    values |= {"auto_map": {"AutoModelForCausalLM": "modeling_small.Small"}}
    (original / "config.json").write_text(json.dumps(values))
    grow(original, tmp_path / "target", *COPY)
    assert not (tmp_path / "target" / "modeling_small.py").exists()
    assert "auto_map" not in (tmp_path / "target" / "config.json").read_text()


def test_the_certificate_is_made_on_the_text_that_is_named(
    source: Callable[[str], Path], grow: Grow, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("0123456789" * 100, encoding="utf-8")
    grow(source("llama"), tmp_path / "target", *COPY, f"certificate.text={tmp_path / 'text.txt'}")
    certificate = json.loads((tmp_path / "target" / RECORD).read_text())["certificate"]
    assert certificate["text"].startswith("text.txt (SHA-256 of the ids ")
    assert certificate["tokens"] == 256
    (tmp_path / "text.txt").write_text("0123")
    line = refusal(grow, source("llama"), tmp_path / "other", *COPY, f"certificate.text={tmp_path / 'text.txt'}")
    assert line.startswith(f"certificate.text: {tmp_path / 'text.txt'} is shorter than one sequence of 33 tokens; ")


def test_a_source_without_a_tokenizer_is_certified_on_random_ids_and_states_so(
    source: Callable[[str], Path], grow: Grow, tmp_path: Path
) -> None:
    shutil.copytree(source("llama"), tmp_path / "source")
    (tmp_path / "source" / "tokenizer.json").unlink()
    shown = grow(tmp_path / "source", tmp_path / "target", *COPY)
    assert "random ids, the source has no tokenizer.json" in shown
    assert "| text | random ids" in (tmp_path / "target" / "README.md").read_text()


def test_a_tokenizer_of_a_larger_vocabulary_is_refused(
    source: Callable[[str], Path], grow: Grow, tmp_path: Path
) -> None:
    shutil.copytree(source("llama"), tmp_path / "source")
    tokenizer(first=100).save_pretrained(tmp_path / "source")
    line = refusal(grow, tmp_path / "source", tmp_path / "target", *COPY)
    assert "tokenizer.json: makes token 3" in line
    assert "the model's vocab_size is 260; take tokenizer and weights from the same checkpoint" in line


def test_the_target_has_the_type_that_was_requested(source: Callable[[str], Path], grow: Grow, tmp_path: Path) -> None:
    words = ["upcycling=copy", "model.num_experts=2", "model.num_experts_per_tok=2"]
    shown = grow(source("llama"), tmp_path / "target", *words, "dtype=bfloat16", "action=plan")
    assert "before it is rounded to bfloat16" in shown
    grow(source("llama"), tmp_path / "target", *words, "dtype=bfloat16")
    assert {info.dtype for info in safetensors_header.read(tmp_path / "target").values()} == {"BF16"}
    record = json.loads((tmp_path / "target" / RECORD).read_text())
    assert record["recipe"]["config"]["dtype"] == record["certificate"]["rounding"]["dtype"] == "bfloat16"
    assert "| dtype | `bfloat16` |" in (tmp_path / "target" / "README.md").read_text()
    assert "dtype bfloat16 -> float32" in refusal(grow, source("llama"), tmp_path / "target", *words)


def test_a_certificate_can_be_left_out_and_the_card_states_so(
    source: Callable[[str], Path], grow: Grow, tmp_path: Path
) -> None:
    grow(source("llama"), tmp_path / "target", *COPY, "certificate.enabled=false")
    assert json.loads((tmp_path / "target" / RECORD).read_text())["certificate"] is None
    assert "is unproven here" in (tmp_path / "target" / "README.md").read_text()


def test_two_checkpoints_are_compared_as_they_are(grown: Callable[..., tuple[Path, Path]], grow: Grow) -> None:
    before, after = grown("llama", *FPI)
    shown = grow(before, after, "action=certify")
    assert "largest difference of a logit" in shown
    assert "256" in shown
    assert "embedded validation text" in shown


def test_a_checkpoint_by_this_tool_is_held_to_what_its_record_claims(
    grown: Callable[..., tuple[Path, Path]], grow: Grow, tmp_path: Path
) -> None:
    before, after = grown("llama", *FPI)
    other = tmp_path / "other"
    shutil.copytree(after, other)
    info = safetensors_header.read(other)["model.layers.0.self_attn.o_proj.weight"]
    data = bytearray((other / "model.safetensors").read_bytes())
    half = (info.start + info.end) // 2
    data[info.start : half], data[half : info.end] = data[half : info.end], data[info.start : half]
    (other / "model.safetensors").write_bytes(data)
    assert "claims to keep the function" in refusal(grow, before, other, "action=certify")
    (other / RECORD).unlink()
    grow(before, other, "action=certify")
    assert "claims" in refusal(grow, before, other, "action=certify", "certificate.tolerance=1e-3")


@pytest.mark.parametrize("name", ["llama tied bf16 sharded", "mistral fp16", "qwen2"])
def test_a_shrink_of_a_grown_checkpoint_computes_in_transformers_what_its_source_computes(
    name: str, grown: Callable[..., tuple[Path, Path]], grow: Grow, tmp_path: Path
) -> None:
    before, after = grown(name, *FPI)
    sizes = [f"{word.split('=')[0]}={SHAPE[word.split('=')[0].removeprefix('model.')]}" for word in LARGER]
    words = [after, tmp_path / "back", "shrink=exact", *sizes]
    assert "layers  0 <- 0, 1 <- 2, 2 <- 4" in grow(*words, "action=plan")
    assert list(tmp_path.iterdir()) == []
    assert "shrink" in grow(*words)
    torch.testing.assert_close(logits(tmp_path / "back"), logits(before), atol=tolerance(name), rtol=0)
    record = json.loads((tmp_path / "back" / RECORD).read_text())
    assert record["recipe"]["config"]["shrink"] == {"method": "exact", "layers": [0, 2, 4]}
    assert record["preserving"] and record["certificate"]["passed"]
    assert "shrunk in width and depth by `exact`" in (tmp_path / "back" / "README.md").read_text()
    assert "cached" in grow(*words)
    grow(after, tmp_path / "back", "action=certify")


def test_experts_that_are_copies_become_a_dense_checkpoint_byte_by_byte(
    grown: Callable[..., tuple[Path, Path]], grow: Grow, tmp_path: Path
) -> None:
    before, after = grown("llama", *COPY)
    grow(after, tmp_path / "dense", "shrink=exact", "model.num_experts=0")
    with RawReader(before) as one, RawReader(tmp_path / "dense") as other:
        assert set(one.names) == set(other.names)
        assert [one.digest(name) for name in one.names] == [other.digest(name) for name in one.names]
    assert logits(tmp_path / "dense").equal(logits(before))


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "growth: none of growth, upcycling and shrink is named; name one, e.g. growth=aki_pro with larger sizes"),
        ([*FPI, *COPY], "growth, upcycling: both are named, a call does one of them; "),
        (["upcycling.layers=all", *FPI], "upcycling.layers: all of no upcycling; "),
        ([*COPY, "upcycling.layers=every"], "upcycling.layers: 'every' is not a choice; "),
        ([*COPY, "upcycling.layers=[0,-1]"], "upcycling.layers: [0, -1] is not a list of layers"),
        ([*COPY, "upcycling.layers=[3]"], "upcycling.layers: layer 3 in the list, the source has 3 layers; "),
        (
            [*COPY, "upcycling.layers=all", "model.mlp_only_layers=[0]"],
            "upcycling.layers: all, and model.mlp_only_layers",
        ),
        ([*FPI, "model.hidden_size=24"], "model.hidden_size: target 24 is smaller than the source's 32; "),
        (
            [*FPI, "model.num_key_value_heads=4"],
            "model: num_attention_heads 6 is not a multiple of num_key_value_heads 4",
        ),
        ([*FPI, "model.head_dim=12"], "model.head_dim: target 12, source 8; "),
        ([*FPI, "growth.depth=[0,1]"], "growth.depth: 2 layers in the list, num_hidden_layers is 5; "),
        ([*FPI, "growth.norm=exct"], "growth.norm: 'exct' is not a choice; did you mean 'exact'?"),
        ([*FPI, "+model.hiden_size=40"], "model.hiden_size: unknown key; did you mean 'hidden_size'?"),
        ([*COPY, "model.num_experts_per_tok=5"], "model: num_experts_per_tok 5 is not between 1 and num_experts 4"),
        ([*FPI, "certificate.tokens=0"], "certificate.tokens: 0 is refused: "),
        ([*FPI, "shrink=exact"], "growth, shrink: both are named, a call does one of them; "),
        (["+shrink.layers=[0]"], "shrink.layers: [0] of no shrink; name one, e.g. shrink=exact"),
        (["shrink=exact", "shrink.layers=[1,0]"], "shrink: layers [1, 0] is not a rising list; "),
        (["shrink=exact", "shrink.layers=[0,7]"], "shrink.layers: layer 7 in the list, the source has 3 layers; "),
        (["shrink=exact", "shrink.layers=[0,1]"], "shrink.layers: layer 2 is not in the list, and adds something"),
        (["shrink=exact"], "model.num_hidden_layers: no size of the target is smaller than the source's; "),
        (["shrink=exact", "model.hidden_size=40"], "model.hidden_size: target 40 is larger than the source's 32; "),
        (["shrink=exact", "model.num_hidden_layers=2"], "model.num_hidden_layers: target 2, but 0 of 3 layers of the "),
        (["shrink=exact", "model.vocab_size=200"], "model.vocab_size: target 200, source 260; a shrink cannot change"),
        (
            ["shrink=exact", "model.intermediate_size=40"],
            "model.intermediate_size: target 40, but 48 of 48 neurons in ",
        ),
    ],
)
def test_a_mistake_is_one_line_that_names_the_place(
    words: list[str], line: str, source: Callable[[str], Path], grow: Grow, tmp_path: Path
) -> None:
    for action in ("run", "plan"):
        assert refusal(grow, source("llama"), tmp_path / "target", *words, f"action={action}").startswith(line)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("nothing", "source: {0}: no such directory; "),
        ("file", "source: {0}: is a file; "),
        ("empty", "{0}/config.json: "),
    ],
)
def test_what_is_no_checkpoint_is_refused_in_one_line(place: str, line: str, grow: Grow, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    assert refusal(grow, tmp_path / place, tmp_path / "target", *FPI).startswith(line.format(tmp_path / place))


def test_what_a_killed_run_left_of_its_record_is_no_file_of_the_target(tmp_path: Path) -> None:
    with output.locked(tmp_path / "target") as place:
        (place.partial / "model.safetensors").write_bytes(b"x")
        (place.partial / ".record.json.tmp").write_text('{"rec')
        recipe = {"kind": "scale_up", "version": 1, "config": {}, "inputs": {}}
        place.publish({"fingerprint": "0123456789ab", "recipe": recipe})
    record = output.published(tmp_path / "target")
    assert record is not None and record["files"] == {"model.safetensors": 1}
    assert {path.name for path in (tmp_path / "target").iterdir()} == {"model.safetensors", "record.json"}


def test_a_file_system_without_locks_is_not_taken_for_another_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(OSError, match="No locks available"), output.locked(tmp_path / "target"):
        pass


def test_a_directory_that_cannot_be_listed_is_not_taken_for_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`rglob` passes over what it may not read: a record would know nothing of the files there."""

    def refuse(path: Any = ".") -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    with output.locked(tmp_path / "target") as place:
        (place.partial / "model.safetensors").write_bytes(b"x")
        monkeypatch.setattr("os.scandir", refuse)
        with pytest.raises(PermissionError):
            place.publish({"fingerprint": "0123456789ab", "recipe": {}})
        monkeypatch.undo()
        assert not (place.partial / RECORD).exists()


@pytest.mark.parametrize("name", ["\udcff", "a\0b"])
def test_a_path_that_no_record_can_name_is_refused_before_anything_is_written(
    name: str, source: Callable[[str], Path], grow: Grow, tmp_path: Path
) -> None:
    """Bytes of a name that are not UTF-8 come as lone surrogates."""
    shown = name.encode("unicode_escape").decode()
    for words in ([source("llama"), tmp_path / name], [tmp_path / name, tmp_path / "target"]):
        line = refusal(grow, *words, *FPI)
        assert line == f"{tmp_path}/{shown}: is not UTF-8, which names of files have to be here; rename it"
    assert list(tmp_path.iterdir()) == []
