"""Growths of 16-bit checkpoints: certified before they are rounded, and held to that on the disk."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from aquilamoe.checkpoint import tensor_names
from aquilamoe.checkpoint.hf_config import read_config
from aquilamoe.config.messages import UserError
from aquilamoe.growth.bounds import default_tolerance
from aquilamoe.growth.certificate import certify
from aquilamoe.growth.claim import Claim
from aquilamoe.growth.depth import map_layers
from aquilamoe.growth.methods import fpi
from aquilamoe.growth.scale_out import scale_out
from aquilamoe.growth.scale_up import scale_up
from aquilamoe.growth.units import map_units
from test_faults import COPY, FPI, SEED, SOURCE, SPARSE, WIDER, changed, damage, judge, role, swap_heads, write_source

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16}
LARGER = SOURCE.model_copy(update=WIDER)

Tensors = dict[str, Tensor]


def grow_up(directory: Path, dtype: torch.dtype) -> Path:
    write_source(directory / "source", dtype=dtype)
    scale_up(directory / "source", directory / "target", changed(SOURCE, FPI, **WIDER), FPI, SEED)
    return directory


@pytest.fixture
def grown(tmp_path: Path) -> Path:
    """`source` in the folder, and what was grown of it: layers 0, 0 again, 1, 2, 2 again, 3."""
    return grow_up(tmp_path, torch.bfloat16)


def refusal(directory: Path, growth: Any = FPI) -> str:
    with pytest.raises(UserError) as error:
        judge(directory, growth)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("spelling", DTYPES)
def test_a_growth_is_measured_as_exactly_as_in_float32_whatever_its_files_round(tmp_path: Path, spelling: str) -> None:
    grow_up(tmp_path, DTYPES[spelling])
    assert default_tolerance(spelling) == default_tolerance("F32")
    certificate = judge(tmp_path, FPI, default_tolerance(spelling))
    assert certificate["max_abs_dlogit"] / certificate["logit_spread"] < 1e-5
    assert max(certificate["layers"]) < 1e-5
    rounding = certificate["rounding"]
    assert rounding["dtype"] == str(DTYPES[spelling]).removeprefix("torch.")
    assert rounding["tokens"] == certificate["tokens"]
    # Both are of one size, and far above that of the growth.
    assert rounding["target_relative"] > 100 * certificate["max_abs_dlogit"] / certificate["logit_spread"]
    assert 1 / 5 < rounding["target_relative"] / rounding["source_relative"] < 5
    assert 1 / 25 < rounding["target_kl"] / rounding["source_kl"] < 25


def test_what_rounding_does_is_what_the_files_compute(grown: Path) -> None:
    """The certificate of files of an unknown growth is that of their logits."""
    source, target = grown / "source", grown / "target"
    tokens_bt = torch.arange(120).view(6, 20) * 7 % 64
    files = certify(source, target, tokens_bt, Claim(preserving=False, tolerance=1e-3))
    rounding = judge(grown, FPI)["rounding"]
    assert files["rounding"] is None
    assert rounding["target_relative"] == pytest.approx(files["max_abs_dlogit"] / files["logit_spread"], rel=1e-4)
    assert rounding["target_kl"] == pytest.approx(files["kl"], rel=1e-4)


def test_a_growth_that_only_copies_is_not_rounded(tmp_path: Path) -> None:
    write_source(tmp_path / "source", dtype=torch.bfloat16)
    scale_out(tmp_path / "source", tmp_path / "target", SOURCE.model_copy(update=SPARSE), COPY, SEED)
    certificate = judge(tmp_path, COPY)
    assert certificate["rounding"] is None and certificate["max_abs_dlogit"] < 1e-5


@pytest.mark.parametrize("spelling", DTYPES)
def test_a_method_that_claims_to_be_exact_and_is_off_by_a_twentieth_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelling: str
) -> None:
    exact = fpi.grow

    def grow(layer: Any, upper_layer: Any, width: Any) -> Any:
        return {
            name: 1.05 * rows if name == tensor_names.V_WEIGHT else rows
            for name, rows in exact(layer, upper_layer, width).items()
        }

    monkeypatch.setattr(fpi, "grow", grow)
    line = refusal(grow_up(tmp_path, DTYPES[spelling]))
    assert "diverge in layer 0 of the target, which differs from layer 0 of the source by 0.0" in line


def test_an_exact_growth_whose_rounding_drives_single_logits_far_is_published(tmp_path: Path) -> None:
    """Attention that is as good as a choice between tokens turns a rounding into another choice."""
    write_source(tmp_path / "source", dtype=torch.bfloat16)

    def sharpen(tensors: Tensors) -> None:
        for layer in range(SOURCE.num_hidden_layers):
            tensors[role(layer, tensor_names.Q_WEIGHT)].mul_(16)

    damage(tmp_path / "source", sharpen)
    scale_up(tmp_path / "source", tmp_path / "target", changed(SOURCE, FPI, **WIDER), FPI, SEED)
    certificate = judge(tmp_path, FPI)
    assert certificate["passed"] is True
    assert certificate["rounding"]["target_relative"] > 0.5
    assert certificate["rounding"]["source_relative"] > 0.5


def break_share(tensors: Tensors) -> None:
    copies = map_units(SOURCE, LARGER, FPI, SEED).residual.copies
    tensors[role(2, tensor_names.UP)].mul_(torch.tensor(copies))


def take_other_layer(tensors: Tensors) -> None:
    for name in tensor_names.role_shapes(SOURCE, 0):
        tensors[role(2, name)].copy_(tensors[role(3, name)])


def disturb_last_place(tensors: Tensors) -> None:
    """One unit in the last place of one number."""
    tensors[role(3, tensor_names.GATE)].view(torch.int16)[5, 7] += 1


FAULTS: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "swapped heads": (lambda tensors: swap_heads(tensors, 3), role(3, tensor_names.Q_WEIGHT)),
    "column not divided": (break_share, role(2, tensor_names.UP)),
    "other layer": (take_other_layer, role(2, tensor_names.INPUT_NORM)),
    "gain": (lambda tensors: tensors[role(3, tensor_names.INPUT_NORM)].mul_(1.05), role(3, tensor_names.INPUT_NORM)),
    "embedding": (lambda tensors: tensors[tensor_names.EMBEDDING][7].mul_(1.1), tensor_names.EMBEDDING),
    "final norm": (lambda tensors: tensors[tensor_names.FINAL_NORM][7].mul_(1.1), tensor_names.FINAL_NORM),
    "head": (lambda tensors: tensors[tensor_names.HEAD][7].mul_(1.1), tensor_names.HEAD),
    "no number": (lambda tensors: tensors[role(3, tensor_names.GATE)][0].fill_(math.nan), role(3, tensor_names.GATE)),
    "one number": (disturb_last_place, role(3, tensor_names.GATE)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_is_not_what_was_certified_is_refused_by_its_tensor(grown: Path, fault: str) -> None:
    change, tensor = FAULTS[fault]
    damage(grown / "target", change)
    assert refusal(grown).startswith(f"certificate: tensor '{tensor}' of the target is ")


def test_a_transposed_expert_is_refused_by_its_tensor(tmp_path: Path) -> None:
    write_source(tmp_path / "source", dtype=torch.float16)
    scale_out(tmp_path / "source", tmp_path / "target", SOURCE.model_copy(update=SPARSE), COPY, SEED)
    expert = tensor_names.layer_name(
        read_config(tmp_path / "target"), 2, tensor_names.expert_role(3, tensor_names.DOWN)
    )
    damage(tmp_path / "target", lambda tensors: tensors[expert].copy_(tensors[expert].T.clone()))
    assert refusal(tmp_path, COPY).startswith(f"certificate: tensor '{expert}' of the target is ")


def test_layers_of_these_growths_are_where_the_tests_look_for_them() -> None:
    assert map_layers(SOURCE, LARGER, FPI).sources == (0, 0, 1, 2, 2, 3)


@pytest.mark.parametrize("place", ["embedding", "expert"])
def test_numbers_that_no_token_needed_are_compared_too(tmp_path: Path, place: str) -> None:
    write_source(tmp_path / "source", dtype=torch.bfloat16)
    scale_out(tmp_path / "source", tmp_path / "target", SOURCE.model_copy(update=SPARSE), COPY, SEED)
    tokens_bt = torch.full((1, 2), 3)  # one token is computed with: it chooses two of four experts
    config = read_config(tmp_path / "target")
    experts = [
        tensor_names.layer_name(config, 1, tensor_names.expert_role(each, tensor_names.UP))
        for each in range(config.num_experts)
    ]
    for damaged in [tensor_names.EMBEDDING] if place == "embedding" else experts:
        damage(tmp_path / "target", lambda tensors, name=damaged: tensors[name][9].mul_(2))
        with pytest.raises(UserError, match=f"tensor '{damaged}' of the target is "):
            certify(
                tmp_path / "source",
                tmp_path / "target",
                tokens_bt,
                Claim(preserving=True, tolerance=1e-3, growth=COPY, seed=SEED),
            )
        damage(tmp_path / "target", lambda tensors, name=damaged: tensors[name][9].div_(2))
