"""Copies are compared with the source's bytes, and computed with once; what is no copy is computed as it is."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from aquilamoe.checkpoint import tensor_names
from aquilamoe.checkpoint.hf_config import read_config
from aquilamoe.config.messages import UserError
from aquilamoe.growth import copied
from aquilamoe.growth.certificate import certify
from aquilamoe.growth.claim import Claim
from aquilamoe.growth.forward import Stored
from aquilamoe.growth.scale_out import scale_out
from test_faults import COPY, SEED, SOURCE, SPARSE, TOKENS_BT, damage, judge, write_source


def upcycle(directory: Path, dtype: torch.dtype) -> Path:
    write_source(directory / "source", dtype=dtype)
    scale_out(directory / "source", directory / "target", SOURCE.model_copy(update=SPARSE), COPY, SEED)
    return directory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_expert_of_a_copy_is_read_from_the_target(
    tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    upcycle(tmp_path, dtype)
    read: list[str] = []
    take = Stored._take

    def note(self: Stored, name: str, mapped: Tensor) -> Tensor:
        read.append(name)
        return take(self, name, mapped)

    monkeypatch.setattr(Stored, "_take", note)
    certificate = judge(tmp_path, COPY)
    assert not [name for name in read if "experts" in name]
    assert max(certificate["layers"]) < 1e-6
    # Of each layer, once for the source itself, and once for all experts.
    downs = [name for name in read if name.endswith(tensor_names.DOWN)]
    assert len(downs) == 2 * SOURCE.num_hidden_layers


def test_equal_experts_make_the_predictions_that_they_make_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upcycle(tmp_path, torch.float64)
    together = judge(tmp_path, COPY)
    monkeypatch.setattr(copied, "_have_equal_bytes", lambda *_: False)
    apart = judge(tmp_path, COPY)
    assert together["target_loss"] == pytest.approx(apart["target_loss"], rel=1e-12)
    assert together["kl"] == pytest.approx(apart["kl"], abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("expert", range(4))
def test_one_number_of_one_expert_that_is_no_copy_is_caught(tmp_path: Path, dtype: torch.dtype, expert: int) -> None:
    upcycle(tmp_path, dtype)
    name = tensor_names.layer_name(
        read_config(tmp_path / "target"), 2, tensor_names.expert_role(expert, tensor_names.DOWN)
    )
    damage(tmp_path / "target", lambda tensors: tensors[name][3].mul_(-1))
    with pytest.raises(UserError, match=r"layer 2 of the target|layers\.2\."):
        certify(
            tmp_path / "source",
            tmp_path / "target",
            TOKENS_BT,
            Claim(preserving=True, tolerance=1e-3, growth=COPY, seed=SEED),
        )
