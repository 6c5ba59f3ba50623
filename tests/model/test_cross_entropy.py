"""The chunked loss is the plain one, value and every gradient, and never holds the logits of all tokens."""

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aquilamoe.config.schema import ModelConfig
from aquilamoe.model.kernels import chunks
from aquilamoe.model.kernels.chunks import chunk_rows
from aquilamoe.model.kernels.cross_entropy import head_cross_entropy
from aquilamoe.model.transformer import Decoder

TOKENS, HIDDEN, VOCABULARY = 50, 8, 37


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 17, 17 and 16 tokens."""
    monkeypatch.setattr(chunks, "FEWEST_ROWS", 1)
    monkeypatch.setattr(chunks, "CHUNK_BYTES", {"cpu": 20 * 4 * VOCABULARY, "cuda": 0})


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden_nd = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    head_vd = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    targets_n = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    return hidden_nd.requires_grad_(), head_vd.requires_grad_(), targets_n


def plain(hidden_nd: Tensor, head_vd: Tensor, targets_n: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden_nd, head_vd), targets_n)


def value_and_gradients(loss: Tensor, *by: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(3 * loss, by)]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_value_and_gradients_are_those_of_the_whole_logits(dtype: torch.dtype, tolerance: float) -> None:
    hidden_nd, head_vd, targets_n = inputs(dtype)
    wide = [tensor.detach().double().requires_grad_() for tensor in (hidden_nd, head_vd)]
    found = value_and_gradients(head_cross_entropy(hidden_nd, head_vd, targets_n), hidden_nd, head_vd)
    expected = value_and_gradients(plain(wide[0], wide[1], targets_n), *wide)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=tolerance, rtol=tolerance)
    assert found[0].dtype == torch.promote_types(dtype, torch.float32)
    assert [gradient.dtype for gradient in found[1:]] == [dtype, dtype]


def test_under_autocast_products_are_in_its_type_and_the_loss_and_gradients_in_float32() -> None:
    hidden_nd, head_vd, targets_n = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = value_and_gradients(head_cross_entropy(hidden_nd, head_vd, targets_n), hidden_nd, head_vd)
        logits_nv = F.linear(hidden_nd, head_vd)
    assert logits_nv.dtype == torch.bfloat16
    expected = value_and_gradients(F.cross_entropy(logits_nv.float(), targets_n), hidden_nd, head_vd)
    assert {tensor.dtype for tensor in found} == {torch.float32}
    torch.testing.assert_close(found[0], expected[0], atol=1e-6, rtol=1e-6)
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=2e-2)


def test_the_loss_is_the_same_without_gradients() -> None:
    hidden_nd, head_vd, targets_n = inputs(torch.float64)
    loss = head_cross_entropy(hidden_nd, head_vd, targets_n)
    with torch.no_grad():
        alone = head_cross_entropy(hidden_nd, head_vd, targets_n)
    assert not alone.requires_grad
    torch.testing.assert_close(alone, loss.detach(), atol=1e-13, rtol=0)


def test_a_loss_too_large_for_a_probability_in_float32_is_still_right() -> None:
    hidden_nd, head_vd = torch.tensor([[200.0]], requires_grad=True), torch.tensor([[1.0], [0.0]])
    assert head_cross_entropy(hidden_nd, head_vd, torch.tensor([1])).item() == 200.0


def network(**changes: Any) -> Decoder:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 32}
    rest = {"rope_theta": 1e4, "rms_norm_eps": 1e-5, "initializer_range": 0.2, "qkv_bias": True}
    sparse = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
    config = sizes | heads | rest | sparse | {"tie_word_embeddings": False} | changes
    model = Decoder(ModelConfig.model_validate(config)).double()
    model.initialize(0)
    return model


@pytest.mark.parametrize("tied", [False, True])
def test_a_network_given_targets_has_the_loss_and_every_gradient_of_its_logits(tied: bool) -> None:
    model = network(tie_word_embeddings=tied)
    tokens_bt = torch.randint(VOCABULARY, (5, 11), generator=torch.Generator().manual_seed(1))
    loss, routings = model(tokens_bt[:, :-1], tokens_bt[:, 1:])
    assert loss.shape == () and len(routings) == 2
    found = value_and_gradients(loss, *model.parameters())
    logits_btv, _ = model(tokens_bt[:, :-1])
    expected = F.cross_entropy(logits_btv.flatten(0, 1), tokens_bt[:, 1:].flatten())
    for ours, theirs in zip(found, value_and_gradients(expected, *model.parameters()), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


def test_chunks_are_about_equal_and_small_but_not_tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert chunk_rows(4096, 4096, "cpu") == 256
    assert chunk_rows(100, 4096, "cpu") == 100
    assert chunk_rows(300, 4096, "cpu") == 150
    assert chunk_rows(10**6, 152_000, "cpu") == pytest.approx(256, abs=1)
    assert 1000 < chunk_rows(10**6, 152_000, "cuda") < 2000


# Not ru_maxrss, which a process inherits from the one that started it.
MEMORY = """
import re, torch
from aquilamoe.model.kernels.cross_entropy import head_cross_entropy
torch.set_num_threads(1)
def peak_mb():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024
hidden_nd = torch.randn(2048, 16, requires_grad=True)
head_vd = torch.randn(152_000, 16, requires_grad=True)
targets_n = torch.randint(152_000, (2048,))
before = peak_mb()
head_cross_entropy(hidden_nd, head_vd, targets_n).backward()
print(peak_mb() - before)
"""


@pytest.mark.process
def test_a_vocabulary_of_152_thousand_takes_a_fraction_of_the_memory_of_its_logits() -> None:
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    whole_mb = 2048 * 152_000 * 4 / 2**20
    assert whole_mb > 1000
    assert 100 < float(done.stdout) < 0.4 * whole_mb
