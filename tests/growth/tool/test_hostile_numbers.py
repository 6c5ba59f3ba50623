"""Numbers of any size in sources and settings: a growth that is right, or one line; never a target that is neither."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from aquilamoe.checkpoint import tensor_names
from aquilamoe.config.messages import UserError
from aquilamoe.growth.tool.output import RECORD
from aquilamoe.pipeline.store import to_json
from small_checkpoints import model, write_source
from test_grow import Grow, grow, refusal  # noqa: F401

FPI = ["growth=fpi", "growth.new_layers=zero", "model.hidden_size=12", "model.intermediate_size=18"]
RANDOM = ["growth=random", *FPI[2:]]
EXPERTS = ["model.num_experts=4", "model.num_experts_per_tok=2"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SMALL = model(qkv_bias=False)


def write(directory: Path, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    write_source(directory, SMALL, dtype)
    values = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(values | config))
    return directory


def change(directory: Path, how: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    path = directory / "model.safetensors"
    save_file({name: how(tensor) for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    return directory


def strict(text: str) -> Any:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("enabled", ["true", "false"])
@pytest.mark.parametrize(
    "words",
    [
        [*FPI, "growth.noise=1e300"],
        ["upcycling=noise", *EXPERTS, "upcycling.noise=1e300"],
        ["upcycling=copy", *EXPERTS, "upcycling.router_std=1e300"],
    ],
    ids=["growth", "experts", "router"],
)
def test_a_weight_that_is_not_finite_is_refused_by_its_tensor_as_it_is_written(
    dtype: str,
    enabled: str,
    words: list[str],
    tmp_path: Path,
    grow: Grow,  # noqa: F811
) -> None:
    source = write(tmp_path / "source", DTYPES[dtype])
    line = refusal(grow, source, tmp_path / "target", *words, f"certificate.enabled={enabled}")
    assert line.startswith("tensor '")
    assert f", which is no number of {dtype}; " in line
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_weight_beyond_float16_is_refused_by_its_tensor(tmp_path: Path, grow: Grow) -> None:  # noqa: F811
    source = change(write(tmp_path / "source", torch.float16), lambda tensor: torch.full_like(tensor, 6e4))
    line = refusal(grow, source, tmp_path / "target", *FPI)
    assert line.startswith("tensor 'model.")
    assert "float16 ends at 65504" in line


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rms_norm_eps", 1e300),
        ("rms_norm_eps", 2.0),
        ("initializer_range", 1e300),
        ("rope_theta", 1e300),
        ("rope_theta", 1e-300),
    ],
)
def test_a_number_that_nothing_can_be_computed_with_is_refused_where_it_stands(
    key: str,
    value: float,
    tmp_path: Path,
    grow: Grow,  # noqa: F811
) -> None:
    changes: dict[str, Any] = {key: value}
    if key == "rope_theta":
        changes["rope_parameters"] = {"rope_type": "default", "rope_theta": value}
    source = write(tmp_path / "source", **changes)
    for action in ("plan", "run"):
        line = refusal(grow, source, tmp_path / "target", *FPI, f"action={action}")
        assert line.startswith(f"{source / 'config.json'}.{key}: {value!r} is refused: ")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("words", [FPI, RANDOM, ["upcycling=copy", *EXPERTS]], ids=["fpi", "random", "experts"])
@pytest.mark.parametrize("value", [0.0, 1e-40])
def test_a_source_that_predicts_nothing_grows_and_the_certificate_states_so(
    words: list[str],
    value: float,
    tmp_path: Path,
    grow: Grow,  # noqa: F811
) -> None:
    source = change(write(tmp_path / "source"), lambda tensor: torch.full_like(tensor, value))
    shown = grow(source, tmp_path / "target", *words)
    record = strict((tmp_path / "target" / RECORD).read_text())
    assert record["certificate"]["logit_spread"] == 0
    assert "the source's logits are all equal" in shown
    assert "the source's logits are all equal" in (tmp_path / "target" / "README.md").read_text()


def test_predictions_that_are_no_numbers_never_pass_whatever_is_claimed(tmp_path: Path, grow: Grow) -> None:  # noqa: F811
    """Finite weights whose products are not."""
    large = write(tmp_path / "source")
    tensors = load_file(large / "model.safetensors")
    for name in (tensor_names.FINAL_NORM, tensor_names.HEAD):
        tensors[name] = tensors[name].sign() * 1e20
    save_file(tensors, large / "model.safetensors", {"format": "pt"})
    for words in (["upcycling=copy", *EXPERTS], ["upcycling=drop", *EXPERTS]):
        assert refusal(grow, large, tmp_path / "target", *words).startswith("certificate: ")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_record_is_json_or_one_line_that_names_the_number() -> None:
    assert strict(to_json({"a": {"b": [1.5, 2]}, "c": None}, "x")) == {"a": {"b": [1.5, 2]}, "c": None}
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(UserError, match=rf"^pretrain-1: metrics\.curve\.1 is {value}, which is no measurement "):
            to_json({"metrics": {"curve": [1.0, value]}}, "pretrain-1")


def word_level(vocabulary: dict[str, int]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def test_a_tokenizer_that_cannot_encode_the_text_is_one_line_that_names_the_remedy(
    tmp_path: Path,
    grow: Grow,  # noqa: F811
) -> None:
    source = write(tmp_path / "source")
    word_level({"a": 0, "b": 1}).save(str(source / "tokenizer.json"))
    line = refusal(grow, source, tmp_path / "target", *FPI)
    assert line.startswith(f"{source / 'tokenizer.json'}: cannot encode a text (WordLevel error: ")
    (tmp_path / "text").write_text("a b " * 400)
    assert "certificate" in grow(source, tmp_path / "target", *FPI, f"certificate.text={tmp_path / 'text'}")


def test_ids_beyond_the_vocabulary_are_one_line(tmp_path: Path, grow: Grow) -> None:  # noqa: F811
    source = write(tmp_path / "source")
    word_level({"[UNK]": 32}).save(str(source / "tokenizer.json"))
    line = refusal(grow, source, tmp_path / "target", *FPI)
    assert "makes token 32 of the held-out text, the model's vocab_size is 32; " in line


def test_a_text_that_makes_no_tokens_is_one_line(tmp_path: Path, grow: Grow) -> None:  # noqa: F811
    source = write(tmp_path / "source")
    Tokenizer(models.BPE({"~": 0}, [])).save(str(source / "tokenizer.json"))
    line = refusal(grow, source, tmp_path / "target", *FPI)
    assert line.startswith("certificate.text: the embedded validation text is shorter than one sequence of 33 tokens; ")


@pytest.mark.parametrize("key", ["tokens", "sequence_length"])
def test_a_certificate_on_more_than_anyone_waits_for_is_refused_before_anything_is_drawn(
    key: str,
    tmp_path: Path,
    grow: Grow,  # noqa: F811
) -> None:
    source = write(tmp_path / "source", max_position_embeddings=2**39)
    line = refusal(grow, source, tmp_path / "target", *FPI, f"certificate.{key}={10**12}")
    assert line.startswith(f"certificate.{key}: 1000000000000 is refused: ")


def test_a_text_that_is_no_file_is_not_waited_for(tmp_path: Path, grow: Grow) -> None:  # noqa: F811
    source = write(tmp_path / "source")
    word_level({"a": 0, "[UNK]": 1}).save(str(source / "tokenizer.json"))
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "source"):
        line = refusal(grow, source, tmp_path / "target", *FPI, f"certificate.text={tmp_path / name}")
        assert line == f"certificate.text: {tmp_path / name} is no file; name a text file"
