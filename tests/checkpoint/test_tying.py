"""A file that declares a tied head, and has one: its numbers decide, for every reader, as they do in transformers."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from aquilamoe.checkpoint import tensor_names
from aquilamoe.checkpoint.hf_config import read_config
from aquilamoe.growth.certificate import certify
from aquilamoe.growth.claim import Claim
from aquilamoe.growth.scale_up import scale_up
from aquilamoe.growth.tool.request import open_checkpoint
from small_checkpoints import growth, logits, model, transformers_logits, upcycle, upcycling, write_source
from test_grow import Grow, grow  # noqa: F401

TIED = model(tie_word_embeddings=True, qkv_bias=False)
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
TOKENS_BT = torch.arange(39).view(3, 13) * 5 % 32


def add_head(directory: Path, head: Tensor | None = None) -> Path:
    """Put a head beside the tied embedding: the embedding once more if no other is given."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    save_file(
        {**tensors, tensor_names.HEAD: tensors[tensor_names.EMBEDDING].clone() if head is None else head},
        path,
        {"format": "pt"},
    )
    return directory


@pytest.fixture
def other_head(tmp_path: Path) -> Path:
    """`source` in the folder declares a tied head, and has another one."""
    write_source(tmp_path / "source", TIED)
    head = torch.randn(TIED.vocab_size, TIED.hidden_size, generator=torch.Generator().manual_seed(3)).double()
    add_head(tmp_path / "source", head)
    return tmp_path


def test_a_head_of_other_numbers_is_read_as_transformers_reads_it(other_head: Path) -> None:
    source = other_head / "source"
    assert '"tie_word_embeddings": true' in (source / "config.json").read_text()
    assert not read_config(source).tie_word_embeddings
    assert not open_checkpoint("source", source).model.tie_word_embeddings
    torch.testing.assert_close(
        logits(source, torch.float32), transformers_logits(source, dtype=torch.float32), atol=1e-4, rtol=0
    )


def test_one_other_number_in_a_head_is_enough(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", TIED)
    head = load_file(source / "model.safetensors")[tensor_names.EMBEDDING].clone()
    head[-1, -1] += 1
    assert not read_config(add_head(source, head)).tie_word_embeddings


def test_a_head_that_is_the_embedding_once_more_is_tied(tmp_path: Path) -> None:
    source = add_head(write_source(tmp_path / "source", TIED))
    assert read_config(source) == TIED
    torch.testing.assert_close(
        logits(source, torch.float32), transformers_logits(source, dtype=torch.float32), atol=1e-4, rtol=0
    )


def test_what_is_grown_of_it_keeps_the_function_that_transformers_sees(other_head: Path) -> None:
    source, how = other_head / "source", growth(noise=0.5)
    untied = read_config(source)
    wider = untied.model_copy(update={"hidden_size": 12, "intermediate_size": 18})
    scale_up(source, other_head / "wider", wider, how, 0)
    upcycle(other_head, untied.model_copy(update=EXPERTS), name="experts")
    before = transformers_logits(source, dtype=torch.float32)
    for name, claim in (("wider", how), ("experts", upcycling())):
        assert not read_config(other_head / name).tie_word_embeddings
        certify(source, other_head / name, TOKENS_BT, Claim(preserving=True, tolerance=1e-6, growth=claim))
        after = transformers_logits(other_head / name, dtype=torch.float32)
        torch.testing.assert_close(after, before, atol=1e-4, rtol=0)


def test_plan_and_card_state_that_a_head_is_read_as_untied(other_head: Path, grow: Grow) -> None:  # noqa: F811
    words = ["growth=fpi", "model.hidden_size=12", "certificate.enabled=false"]
    plan = grow(other_head / "source", other_head / "target", *words, "action=plan")
    grow(other_head / "source", other_head / "target", *words)
    for text in (plan, (other_head / "target" / "README.md").read_text()):
        assert "config.json declares tie_word_embeddings, but lm_head.weight differs from the embedding: " in text
