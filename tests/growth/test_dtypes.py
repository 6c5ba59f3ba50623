"""The types of a target: as in the source tensor by tensor, or as requested; certified either way."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from aquilamoe.checkpoint import tensor_names
from aquilamoe.checkpoint.hf_config import read_checkpoint_config
from aquilamoe.config.graph import grown_model
from aquilamoe.config.messages import UserError
from aquilamoe.growth.certificate import certify
from aquilamoe.growth.claim import Claim
from aquilamoe.growth.dtypes import AS_SOURCE, DtypePolicy, is_norm_or_router
from aquilamoe.growth.scale_out import scale_out
from aquilamoe.growth.scale_up import scale_up
from small_checkpoints import growth, model, upcycling, write_source

WEIGHTS = "model.safetensors"
GROWTH, UPCYCLING = growth(noise=0.5, new_layers="zero"), upcycling()
LARGER = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 12}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2}
TOKENS = torch.arange(60).view(2, 30) * 7 % 32
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def source(directory: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    return write_source(directory, model(**changes), dtype)


def mixed(directory: Path, **changes: Any) -> Path:
    """A checkpoint in bfloat16 whose norms and routers are in float32."""
    write_source(directory, model(**changes), torch.float32)
    tensors = load_file(directory / WEIGHTS)
    kept = {name: tensor if is_small(name) else tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(kept, directory / WEIGHTS, {"format": "pt"})
    return directory


def is_small(name: str) -> bool:
    return is_norm_or_router(name.partition("layers.")[2].partition(".")[2] or name)


def grow(before: Path, after: Path, dtype_policy: DtypePolicy = AS_SOURCE) -> dict[str, Tensor]:
    old = read_checkpoint_config(before).model
    sizes = LARGER | ({"intermediate_size": None, "moe_intermediate_size": 20} if old.is_moe else {})
    target = grown_model(old, sizes, "model", GROWTH)
    scale_up(before, after, target, GROWTH, 0, dtype_policy=dtype_policy)
    return load_file(after / WEIGHTS)


def upcycle(before: Path, after: Path, dtype_policy: DtypePolicy = AS_SOURCE) -> dict[str, Tensor]:
    target = grown_model(read_checkpoint_config(before).model, EXPERTS, "model")
    scale_out(before, after, target, UPCYCLING, 0, dtype_policy=dtype_policy)
    return load_file(after / WEIGHTS)


def certified(before: Path, after: Path) -> dict[str, Any]:
    is_upcycled = read_checkpoint_config(after).model.is_moe and not read_checkpoint_config(before).model.is_moe
    method = UPCYCLING if is_upcycled else GROWTH
    return certify(before, after, TOKENS, Claim(preserving=True, tolerance=1e-3, growth=method, seed=0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [grow, upcycle])
def test_every_tensor_is_that_of_the_source_s_type_rounded_once(make: Any, dtype: Any, tmp_path: Path) -> None:
    before = source(tmp_path / "source")
    exact = make(before, tmp_path / "exact")
    found = make(before, tmp_path / "target", DtypePolicy(dtype))
    assert found.keys() == exact.keys()
    for name, tensor in found.items():
        assert tensor.dtype == DTYPES[dtype]
        assert torch.equal(tensor, exact[name].to(DTYPES[dtype])), name
    values = json.loads((tmp_path / "target" / "config.json").read_text())
    assert values["dtype"] == values["torch_dtype"] == dtype
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "target", dtype="auto").dtype == DTYPES[dtype]
    rounding = certified(before, tmp_path / "target")["rounding"]
    assert (rounding is None) == (dtype == "float32")
    assert rounding is None or rounding["dtype"] == dtype


@pytest.mark.parametrize("make", [grow, upcycle])
def test_a_source_of_mixed_types_keeps_the_type_of_each_tensor(make: Any, tmp_path: Path) -> None:
    before = mixed(tmp_path / "source")
    found = make(before, tmp_path / "target")
    routers = [name for name in found if name.endswith(("mlp.gate.weight", "shared_expert_gate.weight"))]
    assert bool(routers) == (make is upcycle)
    for name, tensor in found.items():
        expected = torch.float32 if is_small(name) and name not in routers else torch.bfloat16
        assert tensor.dtype == expected, name
    values = json.loads((tmp_path / "target" / "config.json").read_text())
    assert values["dtype"] == values["torch_dtype"] == "bfloat16"
    rounding = certified(before, tmp_path / "target")["rounding"]
    assert rounding is None if make is upcycle else rounding["dtype"] == "bfloat16"


def test_norms_and_routers_in_float32_stay_so_when_requested(tmp_path: Path) -> None:
    before = source(tmp_path / "source", **EXPERTS)
    for keep in (False, True):
        found = grow(before, tmp_path / f"target {keep}", DtypePolicy("bfloat16", keep))
        assert any(is_small(name) for name in found)
        for name, tensor in found.items():
            assert tensor.dtype == (torch.float32 if keep and is_small(name) else torch.bfloat16), name
        certified(before, tmp_path / f"target {keep}")


def test_a_fault_in_a_converted_copy_is_found(tmp_path: Path) -> None:
    before, after = source(tmp_path / "source"), tmp_path / "target"
    tensors = upcycle(before, after, DtypePolicy("bfloat16"))
    name = "model.layers.1.self_attn.o_proj.weight"
    tensors[name][3] *= 1.0625
    save_file(tensors, after / WEIGHTS, {"format": "pt"})
    with pytest.raises(UserError, match=f"tensor '{name}' of the target is .* rounding to bfloat16 changes less"):
        certified(before, after)


def test_a_number_that_float16_does_not_have_is_refused_by_name(tmp_path: Path) -> None:
    before = source(tmp_path / "source")
    tensors = load_file(before / WEIGHTS)
    tensors[tensor_names.EMBEDDING][5, 2] = 1e5
    save_file(tensors, before / WEIGHTS, {"format": "pt"})
    with pytest.raises(UserError, match=f"tensor '{tensor_names.EMBEDDING}': .* float16 ends at 65504"):
        upcycle(before, tmp_path / "target", DtypePolicy("float16"))
