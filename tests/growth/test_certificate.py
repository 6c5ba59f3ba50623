"""The certificate of a growth: what it measures, and when it fails the growth."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aquilamoe.checkpoint.state_dict import load_model, save_model
from aquilamoe.config.messages import UserError
from aquilamoe.config.schema import ModelConfig, UpcyclingConfig
from aquilamoe.growth import forward
from aquilamoe.growth import logits as logits_module
from aquilamoe.growth.certificate import certify
from aquilamoe.growth.claim import Claim
from aquilamoe.model.transformer import Decoder

UPCYCLING = UpcyclingConfig(method="copy", noise=0.0, drop_ratio=0.0, router_init="normal", router_std=0.02)
TOKENS_BT = torch.arange(39).view(3, 13) * 5 % 32


def write(directory: Path, seed: int, hidden_size: int = 16, vocab_size: int = 32) -> Path:
    config = ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        max_position_embeddings=32,
        rope_theta=1e4,
        rms_norm_eps=1e-5,
        initializer_range=0.3,
        qkv_bias=True,
        moe_intermediate_size=0,
        tie_word_embeddings=False,
        num_experts=0,
        num_experts_per_tok=0,
    )
    decoder = Decoder(config)
    decoder.initialize(seed)
    save_model(decoder, directory)
    return directory


@torch.no_grad()
def logits(directory: Path) -> Tensor:
    return load_model(directory, torch.float64)(TOKENS_BT[:, :-1])[0]


def test_the_certificate_measures_logits_divergence_and_both_losses(tmp_path: Path) -> None:
    source, target = write(tmp_path / "source", 0), write(tmp_path / "target", 1, hidden_size=20)
    certificate = certify(source, target, TOKENS_BT, Claim(preserving=False, tolerance=1e-4))
    before, after = logits(source).flatten(0, 1), logits(target).flatten(0, 1)
    labels = TOKENS_BT[:, 1:].flatten()
    p, q = before.softmax(-1), after.softmax(-1)
    assert certificate["max_abs_dlogit"] == pytest.approx((before - after).abs().max().item(), rel=1e-5)
    assert certificate["kl"] == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-5)
    assert certificate["source_loss"] == pytest.approx(F.cross_entropy(before, labels).item(), rel=1e-5)
    assert certificate["target_loss"] == pytest.approx(F.cross_entropy(after, labels).item(), rel=1e-5)
    assert certificate["logit_spread"] == pytest.approx(before.std(-1, correction=0).square().mean().sqrt().item())
    assert certificate["tokens"] == 36
    assert (certificate["preserving"], certificate["tolerance"], certificate["passed"]) == (False, 1e-4, True)
    assert certificate["max_abs_dlogit"] > 0.1
    turned = certify(source, target, TOKENS_BT.flip(0), Claim(preserving=False, tolerance=1e-4))
    assert turned["max_abs_dlogit"] == pytest.approx(certificate["max_abs_dlogit"], rel=1e-5)  # wherever the worst is


def test_further_tokens_of_the_target_count_in_its_loss_and_not_in_the_difference_of_logits(tmp_path: Path) -> None:
    source, target = write(tmp_path / "source", 0), write(tmp_path / "target", 1, vocab_size=48)
    certificate = certify(source, target, TOKENS_BT, Claim(preserving=False, tolerance=1e-4))
    before, after = logits(source).flatten(0, 1), logits(target).flatten(0, 1)
    p, q = before.softmax(-1), after.softmax(-1)[:, :32]
    assert certificate["max_abs_dlogit"] == pytest.approx((before - after[:, :32]).abs().max().item(), rel=1e-5)
    assert certificate["kl"] == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-5)
    loss = F.cross_entropy(after, TOKENS_BT[:, 1:].flatten()).item()
    assert certificate["target_loss"] == pytest.approx(loss, rel=1e-5)


def test_a_model_and_its_copy_do_not_differ(tmp_path: Path) -> None:
    source, target = write(tmp_path / "source", 0), write(tmp_path / "target", 0)
    certificate = certify(source, target, TOKENS_BT, Claim(preserving=True, tolerance=1e-6))
    assert certificate["passed"] is True
    assert certificate["max_abs_dlogit"] == certificate["kl"] == 0
    assert certificate["source_loss"] == certificate["target_loss"]


def test_the_tolerance_is_where_a_claim_fails(tmp_path: Path) -> None:
    source, target = write(tmp_path / "source", 0), write(tmp_path / "target", 1)
    measured = certify(source, target, TOKENS_BT, Claim(preserving=False, tolerance=1e-4))
    relative = measured["max_abs_dlogit"] / measured["logit_spread"]
    assert certify(source, target, TOKENS_BT, Claim(preserving=True, tolerance=1.001 * relative))["passed"] is True
    with pytest.raises(UserError):
        certify(source, target, TOKENS_BT, Claim(preserving=True, tolerance=0.999 * relative))


def test_a_broken_claim_is_one_line_with_what_was_measured_and_allowed(tmp_path: Path) -> None:
    source, target = write(tmp_path / "source", 0), write(tmp_path / "target", 1)
    measured = certify(source, target, TOKENS_BT, Claim(preserving=False, tolerance=1e-4))["max_abs_dlogit"]
    with pytest.raises(UserError) as error:
        certify(source, target, TOKENS_BT, Claim(preserving=True, tolerance=1e-4))
    message = str(error.value)
    assert message.startswith("certificate: ")
    assert f"{measured:.3g} over 36 tokens, " in message
    assert "of their spread (tolerance 0.0001)" in message
    assert "\n" not in message


def test_logits_that_are_not_numbers_break_a_claim(tmp_path: Path) -> None:
    source = write(tmp_path / "source", 0)
    broken = load_model(source)
    with torch.no_grad():
        broken.lm_head.weight[5] = math.nan
    save_model(broken, tmp_path / "target")
    with pytest.raises(UserError, match="differ by up to nan"):
        certify(source, tmp_path / "target", TOKENS_BT, Claim(preserving=True, tolerance=1e9))


def test_the_faintest_predictions_are_judged_as_strictly_as_loud_ones(tmp_path: Path) -> None:
    """A head with nearly equal logits makes every difference of logits small, whatever is wrong."""
    for name, seed in (("source", 0), ("target", 1)):
        faint = load_model(write(tmp_path / name, seed))
        with torch.no_grad():
            faint.lm_head.weight.mul_(1e-6)
        save_model(faint, tmp_path / name)
    with pytest.raises(UserError, match="certificate: "):
        certify(tmp_path / "source", tmp_path / "target", TOKENS_BT, Claim(preserving=True, tolerance=1e-3))


def test_progress_counts_the_layers_of_both(tmp_path: Path) -> None:
    source, target = write(tmp_path / "source", 0), write(tmp_path / "target", 0)
    for growth in (None, UPCYCLING):
        seen: list[tuple[int, int]] = []
        claim = Claim(preserving=True, tolerance=1e-3, growth=growth)
        certify(source, target, TOKENS_BT, claim, lambda *step, s=seen: s.append(step))
        assert seen == [(done, 4) for done in range(5)]


def test_slices_of_tokens_and_of_the_vocabulary_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = write(tmp_path / "source", 0), write(tmp_path / "target", 1, vocab_size=48)
    whole = certify(source, target, TOKENS_BT, Claim(preserving=False, tolerance=1e-4))
    for module, name, size in (
        (logits_module, "LOGIT_ROWS", 5),
        (logits_module, "LOGIT_COLUMNS", 7),
        (forward, "TOKENS_AT_ONCE", 5),
    ):
        monkeypatch.setattr(module, name, size)
    pieces = certify(source, target, TOKENS_BT, Claim(preserving=False, tolerance=1e-4))
    assert pieces.pop("layers") == whole.pop("layers")
    assert pieces.pop("rounding") is whole.pop("rounding") is None
    assert pieces == pytest.approx(whole, rel=1e-5)


def test_checkpoints_of_other_vocabularies_are_refused_in_one_line(tmp_path: Path) -> None:
    small, large = write(tmp_path / "small", 0), write(tmp_path / "large", 0, vocab_size=48)
    with pytest.raises(UserError, match="vocab_size: target 32 is smaller than the source's 48; "):
        certify(large, small, TOKENS_BT, Claim(preserving=False, tolerance=1e-4))
    with pytest.raises(UserError, match="tokens: id 40 is among the tokens to compare on, the source has 32 tokens;  "):
        certify(small, large, torch.full((1, 4), 40), Claim(preserving=False, tolerance=1e-4))


def test_weights_of_another_shape_than_in_config_json_are_refused_with_their_name(tmp_path: Path) -> None:
    source = write(tmp_path / "source", 0)
    config = source / "config.json"
    config.write_text(config.read_text().replace('"intermediate_size": 12', '"intermediate_size": 14'))
    with pytest.raises(UserError, match=r"mlp\.gate_proj\.weight' has shape"):
        certify(source, source, TOKENS_BT, Claim(preserving=False, tolerance=1e-4))
