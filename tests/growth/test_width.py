"""Growing tensors in width: norms, heads, tokens, and noise that cancels."""

import math
from pathlib import Path

import pytest
import torch

from aquilamoe.checkpoint import tensor_names
from aquilamoe.config.messages import UserError
from aquilamoe.growth import rules
from aquilamoe.growth.noise import Cancelling
from aquilamoe.growth.units import UnitMap
from small_checkpoints import difference, grow, growth, logits, model, padded, tensor, write_source

SAME = 1e-10  # of logits around 1, in float64


def test_plain_copies_of_norms_are_exact_at_integer_ratios_only(tmp_path: Path) -> None:
    source, how = model(), growth(norm="copy")
    write_source(tmp_path / "source", source)
    double, quarter = model(hidden_size=16), model(hidden_size=10)
    assert rules.preserves(how, source, double)
    assert difference(tmp_path / "source", grow(tmp_path, double, how, name="double")) < SAME
    assert not rules.preserves(how, source, quarter)
    assert difference(tmp_path / "source", grow(tmp_path, quarter, how, name="quarter")) > 0.01


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("hidden", [9, 16, 21], ids=["x1.125", "x2", "x2.625"])
def test_zero_padding_is_exact_at_any_ratio_with_the_epsilon_that_goes_with_it(
    hidden: int, tied: bool, tmp_path: Path
) -> None:
    source, how = model(rms_norm_eps=0.1, tie_word_embeddings=tied), growth(norm="zero_pad", noise=0.5)
    target = padded(source, how, hidden_size=hidden)
    assert target.rms_norm_eps == 0.1 * (hidden // 8 * 8) / hidden
    write_source(tmp_path / "source", source)
    assert difference(tmp_path / "source", grow(tmp_path, target, how)) < SAME
    if hidden % 8:
        with pytest.raises(UserError, match=f"rms_norm_eps: target 0.1, .* set rms_norm_eps to {target.rms_norm_eps}"):
            rules.check(source, source.model_copy(update={"hidden_size": hidden}), how)


@pytest.mark.parametrize("copies", [1, 2])
def test_padding_is_zero_where_it_is_written_and_random_where_it_is_read(copies: int, tmp_path: Path) -> None:
    source, how = model(hidden_size=32, intermediate_size=128), growth(norm="zero_pad", noise=0.5)
    copied, size = 32 * copies, 32 * copies + 16
    write_source(tmp_path / "source", source)
    target = padded(source, how, hidden_size=size)
    grow(tmp_path, target, how)
    down = tensor(tmp_path / "target", tensor_names.layer_name(target, 1, tensor_names.DOWN))
    assert not down[copied:].any()
    assert down[:copied].all()
    assert not tensor(tmp_path / "target", tensor_names.EMBEDDING)[:, copied:].any()
    for role in (tensor_names.UP, tensor_names.Q_WEIGHT):
        read = tensor(tmp_path / "target", tensor_names.layer_name(target, 1, role))
        dense = tensor(tmp_path / "source", tensor_names.layer_name(source, 1, role))
        assert read[:, copied:].std().item() == pytest.approx(dense.std().item() / copies, rel=0.1)
    assert (
        torch.linalg.matrix_rank(tensor(tmp_path / "target", tensor_names.layer_name(target, 1, tensor_names.UP)))
        == size
    )


@pytest.mark.parametrize("ratio", [2, 3])
def test_heads_grow_by_an_integer_and_old_pairs_turn_as_before(ratio: int, tmp_path: Path) -> None:
    source, how = model(), growth()
    target = source.model_copy(update={"head_dim": 4 * ratio})
    write_source(tmp_path / "source", source)
    assert difference(tmp_path / "source", grow(tmp_path, target, how)) < SAME
    before, after = (
        tensor(tmp_path / name, "model.layers.0.self_attn.q_proj.bias").view(8, 2, -1) for name in ("source", "target")
    )
    torch.testing.assert_close(after[..., ::ratio], before * ratio**0.5, atol=0, rtol=1e-12)
    assert not after[..., 1::ratio].any()
    keys = tensor(tmp_path / "target", "model.layers.0.self_attn.k_proj.bias")
    assert keys.all()  # queries that are silent at first learn from keys that are not


def test_new_tokens_get_the_mean_embedding_and_take_no_more_than_a_mean_token(tmp_path: Path) -> None:
    for tied in (False, True):
        directory = tmp_path / str(tied)
        source = model(tie_word_embeddings=tied)
        write_source(directory / "source", source)
        grow(directory, source.model_copy(update={"vocab_size": 40, "hidden_size": 10}), growth(noise=0.5))
        before, after = logits(directory / "source"), logits(directory / "target")
        torch.testing.assert_close(after[..., :32], before, atol=SAME, rtol=0)
        torch.testing.assert_close(after[..., 32:], before.mean(-1, keepdim=True).expand(-1, -1, 8))
        divergence = after.logsumexp(-1) - before.logsumexp(-1)
        assert 0 < divergence.max() <= math.log(1 + 8 / 32)


def test_noise_restores_the_rank_that_copies_take(tmp_path: Path) -> None:
    source, target = model(intermediate_size=20), model(hidden_size=16, intermediate_size=40)
    write_source(tmp_path / "source", source)
    name = tensor_names.layer_name(target, 0, tensor_names.UP)
    ranks = {}
    for noise in (0.0, 0.5):
        grow(tmp_path, target, growth(noise=noise), name=str(noise))
        ranks[noise] = int(torch.linalg.matrix_rank(tensor(tmp_path / str(noise), name)))
    assert ranks == {0.0: source.hidden_size, 0.5: target.hidden_size}


def test_noise_is_relative_to_the_weights_and_leaves_units_without_copies_alone(tmp_path: Path) -> None:
    source = model(hidden_size=64, intermediate_size=64)
    target = model(hidden_size=96, intermediate_size=128)
    write_source(tmp_path / "source", source)
    grow(tmp_path, target, growth(noise=0.0), name="plain")
    grow(tmp_path, target, growth(noise=0.25), name="noisy")
    for name in (tensor_names.layer_name(target, 1, tensor_names.GATE), tensor_names.HEAD):
        rms = tensor(tmp_path / "source", name).square().mean().sqrt()
        noise = tensor(tmp_path / "noisy", name) - tensor(tmp_path / "plain", name)
        assert not noise[:, 32:64].any()
        assert noise[:, :32].square().mean().sqrt() / rms == pytest.approx(0.25, rel=0.1)
        assert (noise[:, :32] + noise[:, 64:]).abs().max() < 1e-12
    rows = tensor(tmp_path / "noisy", tensor_names.layer_name(target, 1, tensor_names.GATE))
    assert (rows[:64] != rows[64:]).any(dim=1).all()  # copies of a neuron are no twins


@pytest.mark.parametrize("copies", [2, 3])
def test_noise_is_added_to_rows_of_new_tokens_alone_which_are_wider_than_what_is_drawn(copies: int) -> None:
    """A block without old tokens holds the mean of all rows in float64, whatever the computation is in."""
    columns = UnitMap((0, 1, 2, *(0, 2) * (copies - 1)), 3)
    noise = Cancelling(columns, "F32")
    block = torch.zeros(4, len(columns.sources), dtype=torch.float64)
    noise.add(block, torch.randn(4, noise.size), 1.0)
    assert block.any()
    assert block.sum(dim=1).abs().max() < 1e-5
