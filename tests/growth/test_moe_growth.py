"""Mixtures of Experts grow in width and depth and keep their function, their choices of experts, and their format."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from aquilamoe.checkpoint import reader as reading
from aquilamoe.checkpoint import tensor_names
from aquilamoe.checkpoint.reader import Reader
from aquilamoe.checkpoint.state_dict import load_model
from aquilamoe.cli.commands import execute
from aquilamoe.config import graph
from aquilamoe.config.messages import UserError
from aquilamoe.config.schema import GrowthConfig, ModelConfig
from aquilamoe.growth import gradient_maps as gradients_module
from aquilamoe.growth import rules
from aquilamoe.growth.certificate import certify
from aquilamoe.growth.claim import Claim
from aquilamoe.growth.gradient_maps import GradientMap
from aquilamoe.growth.scale_up import scale_up
from small_checkpoints import growth, write_source

TOKENS_BT = torch.arange(48).view(4, 12) * 7 % 64
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "qkv_bias": False}
QWEN2 = {"qkv_bias": True, "shared_expert_intermediate_size": 28, "norm_topk_prob": False}
SOURCES: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen2_moe": {"qkv_bias": True},
    "qwen2_moe shared": {**QWEN2, "mlp_only_layers": (1,), "intermediate_size": 24},
    "qwen3_moe": {"qk_norm": "head", "norm_topk_prob": False},
    "qwen3_moe dense first": {"qk_norm": "head", "mlp_only_layers": (0,), "intermediate_size": 24},
    "olmoe": {"qk_norm": "projection", "norm_topk_prob": False},
}
# Sizes that fit no ratio, then twice of everything. OLMoE's heads together are as wide as its residual stream.
SIZES: dict[str, dict[str, Any]] = {
    "hidden": {"hidden_size": 48, "num_attention_heads": 6},
    "experts": {"moe_intermediate_size": 31},
    "twice": {
        "hidden_size": 64,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 40,
    },
    "transformers": {  # whose kernel of experts wants rows of a multiple of 16 bytes
        "hidden_size": 48,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "moe_intermediate_size": 28,
    },
    "all": {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3, "moe_intermediate_size": 31},
}


def source_of(kind: str) -> ModelConfig:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 20, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
    others = {"rope_theta": 1e4, "rms_norm_eps": 1e-5, "initializer_range": 0.02, "tie_word_embeddings": False}
    return ModelConfig.model_validate({**sizes, **heads, **others, **EXPERTS, **SOURCES[kind]})


def target_of(source: ModelConfig, how: GrowthConfig, layers: int = 2, **sizes: Any) -> ModelConfig:
    if source.shared_expert_intermediate_size and "moe_intermediate_size" in sizes:
        sizes["shared_expert_intermediate_size"] = sizes["moe_intermediate_size"] + 6
    if source.mlp_only_layers:
        sizes["intermediate_size"] = 37
    sizes["mlp_only_layers"] = rules.dense_layers(source, source.model_copy(update={"num_hidden_layers": layers}), how)
    changed = source.model_dump() | {"num_hidden_layers": layers} | sizes
    return ModelConfig.model_validate(changed | {"rms_norm_eps": how.grown_eps(source, changed["hidden_size"])})


@torch.no_grad()
def computed(directory: Path) -> tuple[Tensor, list[Tensor]]:
    """Logits, and the experts that every router chooses for every token."""
    logits, routings = load_model(directory, torch.float64)(TOKENS_BT)
    return logits, [routing.experts_nk.sort().values for routing in routings]


def grown(folder: Path, kind: str, how: GrowthConfig, layers: int, sizes: str, dtype: torch.dtype) -> ModelConfig:
    source = source_of(kind)
    target = target_of(source, how, layers, **SIZES[sizes])
    write_source(folder / "source", source, dtype)
    scale_up(folder / "source", folder / "target", target, how, seed=3)
    return target


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("kind", SOURCES)
def test_any_width_and_silent_layers_keep_logits_and_chosen_experts(tmp_path: Path, kind: str, sizes: str) -> None:
    how = growth(noise=0.3, new_layers="zero")
    target = grown(tmp_path, kind, how, 3, sizes, torch.float64)
    assert rules.preserves(how, source_of(kind), target)
    (before, chosen), (after, chosen_after) = computed(tmp_path / "source"), computed(tmp_path / "target")
    assert (before - after).abs().max() < 1e-12 * before.std()
    sparse = [layer for layer in range(3) if target.is_sparse(layer)]
    first_copies = [experts for layer, experts in zip(sparse, chosen_after, strict=True) if layer != 1]  # of 0, 0, 1
    assert all(torch.equal(one, other) for one, other in zip(chosen, first_copies, strict=True))


@pytest.mark.parametrize("kind", SOURCES)
def test_transformers_opens_a_grown_mixture_and_computes_the_source(tmp_path: Path, kind: str) -> None:
    grown(tmp_path, kind, growth(noise=0.3, new_layers="zero"), 3, "transformers", torch.float32)
    logits = []
    for name in ("source", "target"):
        opened: Any = AutoModelForCausalLM.from_pretrained(
            tmp_path / name, dtype=torch.float32, output_loading_info=True
        )
        model, report = opened
        assert {key: list(found) for key, found in report.items() if found} == {}
        with torch.no_grad():
            logits.append(model(TOKENS_BT).logits)
    assert (logits[0] - logits[1]).abs().max() < 1e-4 * logits[0].std()


def test_the_certificate_of_a_grown_mixture_passes_and_catches_an_expert_in_anothers_place(tmp_path: Path) -> None:
    how = growth(noise=0.3, new_layers="zero")
    target = grown(tmp_path, "qwen2_moe shared", how, 3, "all", torch.float32)
    folders = tmp_path / "source", tmp_path / "target"
    found = certify(*folders, TOKENS_BT, Claim(preserving=True, tolerance=1e-3, growth=how, seed=3))
    assert found["passed"] is True
    assert found["kl"] < 1e-8
    with Reader(folders[1]) as reader:
        tensors = {name: reader.get(name).clone() for name in tensor_names.tensor_shapes(target)}
    one, other = (
        tensor_names.layer_name(target, 0, tensor_names.expert_role(expert, tensor_names.DOWN)) for expert in (1, 2)
    )
    tensors[one], tensors[other] = tensors[other], tensors[one]
    reading.write(folders[1], tensor_names.tensor_shapes(target), torch.float32, iter(tensors.items()))
    with pytest.raises(UserError, match=r"diverge in layer 0 of the target, which differs from layer 0 of the source"):
        certify(*folders, TOKENS_BT, Claim(preserving=True, tolerance=1e-3, growth=how, seed=3))


@pytest.mark.parametrize("kind", SOURCES)
def test_gradients_of_copies_add_up_to_those_of_the_source(tmp_path: Path, kind: str) -> None:
    """What a growth of the optimizer's state rests on, for every parameter that has a gradient map."""
    how = growth(noise=0.0, new_layers="zero")
    target = grown(tmp_path, kind, how, 2, "twice", torch.float64)
    gradients = [gradients_of(tmp_path / name) for name in ("source", "target")]
    for name, maps in gradients_module.gradient_maps(source_of(kind), target, how, 3):
        for gradient_map in maps:
            expected = mapped(gradients[0][gradient_map.name], gradient_map)
            found = gradients[1][name] if gradient_map.expert is None else gradients[1][name][gradient_map.expert]
            assert (expected - found).abs().max() < 1e-10 * found.abs().max(), name


@pytest.mark.parametrize("method", ["aki", "aki_pro", "hypercloning", "random"])
def test_every_method_grows_a_mixture_to_finite_tensors_of_the_targets_shapes(tmp_path: Path, method: str) -> None:
    target = grown(tmp_path, "qwen2_moe", growth(method=method), 2, "twice", torch.float32)
    with Reader(tmp_path / "target") as reader:
        for name, shape in tensor_names.tensor_shapes(target).items():
            assert tuple(reader.get(name).shape) == shape
            assert reader.get(name).isfinite().all()
        fillers = [tensor_names.layer_name(target, 0, role) for role in tensor_names.filler_roles(target)]
        assert fillers
        assert not any(reader.get(name).any() for name in fillers)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("mixtral", {"num_experts": 12}, "num_experts: target 12, source 6; a scale-up keeps the experts"),
        ("mixtral", {"moe_intermediate_size": 10}, "moe_intermediate_size: target 10 is smaller than the source's 20"),
        ("mixtral", {"num_experts_per_tok": 3}, "num_experts_per_tok: target 3, source 2; a scale-up cannot change it"),
        ("qwen2_moe", {"shared_expert_intermediate_size": 28}, "the source has no shared expert"),
        (
            "qwen3_moe dense first",
            {"num_hidden_layers": 4, "mlp_only_layers": (0,)},
            r"mlp_only_layers: target \[0\], but the copies of the source's dense layers \[0\] are \[0, 1\]; set",
        ),
    ],
)
def test_what_a_scale_up_of_a_mixture_cannot_do_is_refused(kind: str, changes: dict[str, Any], message: str) -> None:
    source = source_of(kind)
    with pytest.raises(UserError, match=message):
        rules.check(source, ModelConfig.model_validate(source.model_dump() | changes), growth())


def test_neurons_of_a_dense_feed_forward_that_is_not_there_are_refused() -> None:
    with pytest.raises(UserError, match=r"^model.intermediate_size: 64, but every layer has experts, of 20 neurons"):
        graph.grown_model(source_of("mixtral"), {"intermediate_size": 64}, "model", growth())


def gradients_of(directory: Path) -> dict[str, Tensor]:
    decoder = load_model(directory, torch.float64)
    loss, _ = decoder(TOKENS_BT[:, :-1], TOKENS_BT[:, 1:])
    loss.backward()
    return {name: parameter.grad for name, parameter in decoder.named_parameters() if parameter.grad is not None}


def mapped(gradient: Tensor, gradient_map: GradientMap) -> Tensor:
    """The gradient of the source where the target has it."""
    gradient = gradient if gradient_map.expert is None else gradient[gradient_map.expert]
    for dim, axis in enumerate((gradient_map.rows, gradient_map.columns)[: gradient.dim()]):
        if axis.index is not None:
            gradient = gradient.index_select(dim, axis.index)
        if axis.share is not None:
            gradient = gradient * axis.share.view(*(-1 if at == dim else 1 for at in range(gradient.dim())))
    return gradient * gradient_map.share


@pytest.mark.process
def test_a_stage_grows_what_a_mixture_has_learned_and_training_continues_with_its_optimizer_state(
    compose: Callable[..., Any], tiny: list[str], tmp_path: Path
) -> None:
    """Dense, then experts, then a wider mixture, whose held-out loss starts where that of its source ended."""
    words = ["growth=fpi", "growth.new_layers=zero", "stages.moe.optimizer_state=reset", "until=wide_moe"]
    values = compose(*tiny, *words, f"paths.root={tmp_path}", "tracking.enabled=false")
    stages = values["stages"]
    sizes = {"hidden_size": 32, "moe_intermediate_size": 56, "num_hidden_layers": 4}
    wider = stages["scale_up"] | {"optimizer_state": "grow", "model": stages["scale_up"]["model"] | sizes}
    wider["model"] |= {"intermediate_size": None, "num_attention_heads": None}
    stages["wider"] = wider | {"inputs": stages["scale_up"]["inputs"] | {"source": "moe"}}
    stages["wide_moe"] = stages["dense"] | {"optimizer_state": "keep"}
    stages["wide_moe"] |= {"inputs": stages["dense"]["inputs"] | {"source": "wider"}}
    execute(values, "a test")
    records = {
        path.parent.name.rpartition("-")[0]: json.loads(path.read_text())
        for path in tmp_path.glob("stages/*/record.json")
    }
    certificate, trained = records["wider"]["metrics"], records["wide_moe"]["metrics"]
    assert certificate["preserving"] is True
    assert certificate["params_total"] > records["moe"]["metrics"]["params_total"]
    assert trained["loss_start"] == pytest.approx(records["moe"]["metrics"]["loss_end"], abs=1e-4)
