"""The signed split: which tokens keep their experts, what directions are worth, and what is reported and refused."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import AutoModelForCausalLM

import aquilamoe
from aquilamoe.checkpoint import tensor_names
from aquilamoe.checkpoint.state_dict import load_model
from aquilamoe.cli.commands import execute
from aquilamoe.config.messages import UserError
from aquilamoe.config.schema import ModelConfig, UpcyclingConfig
from aquilamoe.growth import directions, gradient_maps, rng, rules, split
from aquilamoe.growth.certificate import certify
from aquilamoe.growth.claim import Claim
from aquilamoe.growth.directions import RouterInputs
from aquilamoe.growth.scale_out import scale_out
from aquilamoe.growth.tool.card import verdict
from aquilamoe.model.transformer import MixtureOfExperts, Routing
from small_checkpoints import model, tensor, upcycling, write_source

VOCABULARY = 64
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen2_moe": {"qkv_bias": True, "norm_topk_prob": False},
    "qwen3_moe": {"qk_norm": "head", "mlp_only_layers": (0,)},
    "olmoe": {"qk_norm": "projection", "norm_topk_prob": False},
}
SIZES = {"hidden_size": 32, "intermediate_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
BLIND = {"direction": "random", "calibration_tokens": 0, "common_row": False}


def mixture(experts: int = 6, chosen: int = 2, **changes: Any) -> ModelConfig:
    sizes = SIZES | {"num_experts": experts, "num_experts_per_tok": chosen, "moe_intermediate_size": 16}
    return model(**{"vocab_size": VOCABULARY, "qkv_bias": False, "max_position_embeddings": 64} | sizes | changes)


def more(source: ModelConfig, copies: int = 2) -> ModelConfig:
    return source.model_copy(update={"num_experts": copies * source.num_experts})


def parted(**changes: Any) -> UpcyclingConfig:
    return upcycling(**{"method": "split", "calibration_tokens": 1024} | changes)


def texts(rows: int = 32, length: int = 32, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def grown(folder: Path, source: ModelConfig, how: UpcyclingConfig, copies: int = 2, name: str = "target") -> Path:
    """`source` in the folder, with more experts."""
    found = None
    if how.method == "split":
        tokens_bt = texts() if how.calibration_tokens else None
        found = split.calibrate(folder / "source", more(source, copies), how, 0, tokens_bt)
    scale_out(folder / "source", folder / name, more(source, copies), how, 0, split=found)
    return folder / name


@torch.no_grad()
def computed(directory: Path, tokens_bt: Tensor) -> tuple[Tensor, list[Routing]]:
    logits, routings = load_model(directory, torch.float64)(tokens_bt)
    return logits.flatten(0, 1), routings


def originals(routing: Routing, copies: int = 1) -> Tensor:
    return (routing.experts_nk // copies).sort(dim=1).values


@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize("copies", [2, 3, 4])
def test_tokens_keep_their_experts_exactly_where_the_shift_exceeds_the_gap(
    copies: int, norm_topk_prob: bool, tmp_path: Path
) -> None:
    source, how = mixture(num_hidden_layers=1, norm_topk_prob=norm_topk_prob), parted(shift=2.0)
    write_source(tmp_path / "source", source)
    tokens_bt = texts(seed=1)
    logits, (before,) = computed(tmp_path / "source", tokens_bt)
    after_logits, (after,) = computed(grown(tmp_path, source, how, copies), tokens_bt)
    shifts_nm = after.logits_ne.unflatten(1, (-1, copies)).mean(dim=1)
    top_nk = before.logits_ne.topk(2, dim=1).values
    is_apart = directions.margin(shifts_nm) > top_nk[:, 0] - top_nk[:, 1]
    is_same = (originals(before) == originals(after, copies)).all(dim=1)
    assert 0.6 < is_apart.double().mean() < 0.99
    assert torch.equal(is_same, is_apart)
    if norm_topk_prob:
        assert (logits - after_logits)[is_apart].abs().max() < 1e-10
        assert (logits - after_logits)[~is_apart].abs().amax(dim=1).min() > 1e-3


def test_shares_among_all_experts_are_multiplied_by_a_sigmoid_of_the_shift() -> None:
    source = mixture(num_hidden_layers=1, norm_topk_prob=False)
    x_nd = torch.randn(64, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows_ed, u_d = torch.randn(6, 32, dtype=torch.float64), torch.randn(32, dtype=torch.float64)
    layers = MixtureOfExperts(source).double(), MixtureOfExperts(more(source)).double()
    with torch.no_grad():
        for layer, rows in zip(
            layers, (rows_ed, rows_ed.repeat_interleave(2, 0) + torch.stack([u_d, -u_d]).repeat(6, 1)), strict=False
        ):
            layer.gate.weight.copy_(rows)
        logits = [layer.gate(x_nd) for layer in layers]
    best_n = logits[0].argmax(dim=1)
    before_n = logits[0].softmax(dim=1).gather(1, best_n[:, None])[:, 0]
    copies_n2 = logits[1].softmax(dim=1).unflatten(1, (-1, 2)).gather(1, best_n[:, None, None].expand(-1, 1, 2))[:, 0]
    assert torch.allclose(copies_n2.amax(dim=1), before_n * (2 * (x_nd @ u_d).abs()).sigmoid(), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shift", [0.1, 3.0, 100.0])
def test_with_one_expert_for_a_token_the_function_is_kept_for_every_shift(
    shift: float, dtype: torch.dtype, tmp_path: Path
) -> None:
    source, how = mixture(chosen=1), parted(shift=shift)
    write_source(tmp_path / "source", source, dtype)
    assert rules.preserves(how, source, more(source))
    found = split.calibrate(tmp_path / "source", more(source), how, 0, texts())
    scale_out(tmp_path / "source", tmp_path / "target", more(source), how, 0, split=found)
    certificate = certify(
        tmp_path / "source",
        tmp_path / "target",
        texts(4, 33, 2),
        Claim(preserving=True, tolerance=1e-3, growth=how, split=found),
    )
    # In float32 a KL is known to its rounding, which depends on the processor.
    assert certificate["kl"] < (1e-9 if dtype == torch.float64 else torch.finfo(torch.float32).eps)
    assert certificate["experts"]["same_originals"] == 1.0
    assert certificate["experts"]["shift"] == pytest.approx([shift] * 2, rel=0.25)


def test_a_common_row_changes_no_share_and_lowers_the_z_loss(tmp_path: Path) -> None:
    source = mixture()
    write_source(tmp_path / "source", source)
    found = {
        common: computed(grown(tmp_path, source, parted(common_row=common), name=str(common)), texts(seed=1))
        for common in (True, False)
    }
    assert (found[True][0] - found[False][0]).abs().max() < 1e-9
    z_losses = {
        common: [routing.logits_ne.logsumexp(dim=1).square().mean().item() for routing in routings]
        for common, (_, routings) in found.items()
    }
    assert all(less < 0.7 * plain for less, plain in zip(z_losses[True], z_losses[False], strict=True))


def structured(tokens: int, seed: int) -> RouterInputs:
    """Inputs of two kinds, which lie apart along a direction that no router reads."""
    random = torch.Generator().manual_seed(seed)
    x_nd = torch.randn(tokens, 32, generator=random)
    x_nd[:, 5] = 3 * (2.0 * torch.randint(0, 2, (tokens,), generator=random) - 1) + 0.5 * x_nd[:, 5]
    x_nd[:, 0] += 2
    rows_ed = torch.randn(6, 32, generator=torch.Generator().manual_seed(9)) / 5
    rows_ed[:, 5] = 0
    return RouterInputs(x_nd, rows_ed, 2)


def test_a_learned_direction_needs_less_shift_than_a_random_one_on_tokens_it_was_not_learned_on() -> None:
    inputs, held_out = structured(2048, 0), structured(4096, 1)
    needed = {}
    for find in (directions.learned, directions.random_direction):
        u_d = find(inputs, inputs.x_nd[:0], rng.stream(0, "a test"))
        needed[find] = directions.needed(held_out.gap_n, 2 * (held_out.x_nd @ u_d).abs())
        sides_n = held_out.x_nd @ u_d > 0
        of_experts = torch.stack([sides_n[(held_out.experts_nk == e).any(dim=1)].double().mean() for e in range(6)])
        assert of_experts.min() > 0.35 and of_experts.max() < 0.65
    assert needed[directions.learned] < 0.2 * needed[directions.random_direction]


def test_directions_are_centred_scaled_and_uncorrelated_with_scores_and_each_other() -> None:
    inputs = structured(2048, 0)
    first_d = directions.learned(inputs, inputs.x_nd[:0], rng.stream(0, "a test"))
    second_d = directions.learned(inputs, first_d[None], rng.stream(0, "another"))
    read_n2 = inputs.x_nd @ torch.stack([first_d, second_d]).T
    assert torch.allclose(read_n2.std(dim=0, correction=0), torch.ones(2), atol=0.05)
    assert ((read_n2 > 0).double().mean(dim=0) - 0.5).abs().max() < 0.05
    correlations = torch.corrcoef(
        torch.cat([read_n2, inputs.logits_ne - inputs.logits_ne.mean(dim=1, keepdim=True)], 1).T
    )
    assert correlations[0, 1:].abs().max() < 0.15


@pytest.mark.parametrize("copies", [3, 5])
def test_copies_that_are_no_power_of_two_get_as_many_tokens_each(copies: int) -> None:
    inputs = structured(4096, 0)
    rows_md = directions.centroids(inputs, copies, rng.stream(0, "a test"))
    shares = (inputs.x_nd @ rows_md.T).argmax(dim=1).bincount(minlength=copies) / 4096
    assert shares.min() > 0.5 / copies


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, BLIND])
def test_transformers_opens_what_was_split_and_computes_the_same(
    family: str, options: dict[str, Any], tmp_path: Path
) -> None:
    source = mixture(**FAMILIES[family])
    write_source(tmp_path / "source", source, torch.float32)
    target = grown(tmp_path, source, parted(**options))
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        target, output_loading_info=True, dtype=torch.float64, experts_implementation="eager"
    )
    network, report = loaded
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        theirs = network.eval()(texts(2, 16)).logits.flatten(0, 1)
    assert (theirs - computed(target, texts(2, 16))[0]).abs().max() < 1e-4  # their routers compute in float32


def gradients(directory: Path, suffix: str) -> list[Tensor]:
    """Of the language loss, of the parameters with this end of a name, by layer."""
    decoder = load_model(directory, torch.float64)
    tokens_bt = texts(4, 33, 3)
    decoder(tokens_bt[:, :-1], tokens_bt[:, 1:])[0].backward()
    found = [parameter.grad for name, parameter in decoder.named_parameters() if name.endswith(suffix)]
    return [gradient for gradient in found if gradient is not None]


def router_gradient(directory: Path) -> float:
    found = gradients(directory, tensor_names.ROUTER)
    assert len(found) == 2
    return sum(gradient.norm().item() for gradient in found)


def test_the_router_learns_from_the_first_step_where_that_of_equal_copies_has_no_gradient(tmp_path: Path) -> None:
    source = mixture()
    write_source(tmp_path / "source", source)
    before = router_gradient(tmp_path / "source")
    assert router_gradient(grown(tmp_path, source, parted())) > 0.3 * before
    assert router_gradient(grown(tmp_path, source, upcycling(), name="copies")) < 1e-9 * before


def test_twins_have_gradients_of_their_own_which_add_up_to_that_of_the_original(tmp_path: Path) -> None:
    source, how = mixture(chosen=1), parted()
    write_source(tmp_path / "source", source)
    before, after = (
        gradients(directory, "mlp.experts.up_proj")[0]
        for directory in (tmp_path / "source", grown(tmp_path, source, how))
    )
    twins = after.unflatten(0, (-1, 2))
    assert torch.allclose(twins.sum(dim=1), before, atol=1e-12)
    assert torch.nn.functional.cosine_similarity(twins[:, 0].flatten(1), twins[:, 1].flatten(1)).abs().max() < 0.5


def test_moments_of_a_split_are_those_of_a_part_of_the_tokens() -> None:
    source = mixture()
    maps = dict(gradient_maps.gradient_maps(source, more(source), parted(), 0))
    (router,), experts = maps["model.layers.0.mlp.gate.weight"], maps["model.layers.0.mlp.experts.up_proj"]
    assert (router.share, router.spread) == (0.5, 2)
    assert router.rows.index is not None and router.rows.index.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert [(past.expert, past.share, past.spread) for past in experts[:3]] == [(0, 0.5, 2), (0, 0.5, 2), (1, 0.5, 2)]


def test_a_split_is_the_same_bytes_again_and_other_rows_with_another_seed(tmp_path: Path) -> None:
    source, how = mixture(), parted(direction="random")
    write_source(tmp_path / "source", source)
    router = tensor_names.layer_name(source, 0, tensor_names.ROUTER)
    first, second = (grown(tmp_path, source, how, name=name) for name in ("first", "second"))
    assert torch.equal(tensor(first, router), tensor(second, router))
    other = split.calibrate(tmp_path / "source", more(source), how, 1, texts())
    assert not torch.allclose(
        other.offsets[0], split.calibrate(tmp_path / "source", more(source), how, 0, texts()).offsets[0]
    )


def test_an_automatic_shift_is_what_98_percent_need_and_16_bits_can_hold(tmp_path: Path) -> None:
    source, shifts = mixture(), {}
    for dtype in (torch.float32, torch.bfloat16):
        write_source(tmp_path / str(dtype), source, dtype)
        shifts[dtype] = split.calibrate(tmp_path / str(dtype), more(source), parted(shift="auto"), 0, texts()).shifts
    assert min(shifts[torch.float32].values()) > 5
    assert set(shifts[torch.bfloat16].values()) == {5.0}


def measured(tmp_path: Path, how: UpcyclingConfig, name: str) -> Mapping[str, Any]:
    target = grown(tmp_path, mixture(), how, name=name)
    return certify(tmp_path / "source", target, texts(16, 33, 2), Claim(preserving=False, tolerance=1e-3, growth=how))


def test_a_certificate_states_how_near_a_split_is_and_warns_of_equal_copies(tmp_path: Path) -> None:
    write_source(tmp_path / "source", mixture(), torch.float32)
    near, copies = measured(tmp_path, parted(shift=30.0), "near"), measured(tmp_path, upcycling(), "copies")
    assert near["kl"] < 0.1 * copies["kl"]
    assert verdict(near).startswith("nearly function-preserving")
    assert verdict(copies).startswith("not function-preserving: KL 0.")
    experts = near["experts"]
    assert experts["same_originals"] == pytest.approx(1 - experts["fence"], abs=0.02)
    assert experts["shift"] == pytest.approx([30, 30], rel=0.25)
    assert experts["warnings"] == [] and 0.3 < experts["smallest_copy"] < 0.5
    assert (copies["experts"]["same_originals"], copies["experts"]["needed_shift"]) == (0.0, None)
    (warning,) = copies["experts"]["warnings"]
    assert (
        "no gradient that separates copies; use upcycling=split, num_experts_per_tok 4, or upcycling=noise" in warning
    )


def test_what_the_criterion_expects_on_the_inputs_of_the_source_is_what_happens_in_the_first_layer(
    tmp_path: Path,
) -> None:
    source, how = mixture(num_hidden_layers=1), parted()
    write_source(tmp_path / "source", source, torch.float32)
    experts = certify(
        tmp_path / "source",
        grown(tmp_path, source, how),
        texts(16, 33, 2),
        Claim(preserving=False, tolerance=1e-3, growth=how),
    )["experts"]
    assert experts["same_originals"] == 1 - experts["fence"]


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        (
            mixture(),
            mixture(9),
            "num_experts: target 9, source 6; every expert gets as many copies, use a multiple of 6",
        ),
        (mixture(), mixture(6), "num_experts: target 6, source 6; a split makes several of each expert, .* e.g. 12"),
        (mixture(), mixture(12, 4), "num_experts_per_tok: target 4, source 2; a split keeps it"),
        (
            mixture(0, 0, moe_intermediate_size=0),
            mixture(12, 2),
            "upcycling.method: split of a source without experts; .* upcycling=copy first",
        ),
        (mixture(), mixture(6 * 33), "num_experts: target 198 is 33 copies of each expert, which 32 channels"),
    ],
)
def test_what_cannot_be_split_is_refused(source: ModelConfig, target: ModelConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        rules.check(source, target, parted())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"direction": "best"}, "'learned' or 'random'"),
        ({"shift": "much"}, "'much' is neither a number above 0 nor auto; use e.g. 3"),
        ({"shift": 0}, "0 is neither a number above 0 nor auto"),
        ({"calibration_tokens": 5}, "calibration_tokens 5; directions are found on 256 tokens or more, or on 0"),
        ({"calibration_tokens": 0}, "direction learned with calibration_tokens 0; .* or direction to random"),
        ({**BLIND, "shift": "auto"}, "shift auto with calibration_tokens 0; .* or shift to a number"),
        ({**BLIND, "common_row": True}, "common_row true with calibration_tokens 0; .* or common_row to false"),
        (
            {"method": "copy"},
            "method copy with calibration_tokens 1024; calibration_tokens is of 'split' and 'mix', leave it out",
        ),
    ],
)
def test_settings_of_a_split_that_contradict_each_other_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        parted(**changes)


def test_recipes_of_other_upcyclings_have_no_keys_of_a_split() -> None:
    assert set(upcycling().model_dump()) == {"method", "noise", "drop_ratio", "router_init", "router_std"}
    assert upcycling(method="split").model_dump()["shift"] == 3.0


def test_equal_copies_of_which_all_are_chosen_are_not_warned_of() -> None:
    source = mixture()
    assert rules.warnings(upcycling(), source, more(source))
    assert not rules.warnings(upcycling(), source, more(source).model_copy(update={"num_experts_per_tok": 4}))
    assert not rules.warnings(upcycling(), mixture(chosen=1), more(mixture(chosen=1)))
    assert not rules.warnings(upcycling(method="noise", noise=0.1), source, more(source))


def test_the_tool_splits_plans_and_serves_it_again(tmp_path: Path) -> None:
    write_source(tmp_path / "source", mixture(), torch.float32)
    arguments: dict[str, Any] = {
        "model": {"num_experts": 12},
        "upcycling": {"method": "split", "calibration_tokens": 512},
    }
    plan = aquilamoe.plan_growth(tmp_path / "source", tmp_path / "target", **arguments)
    assert not plan.preserving
    (router,) = [line for line in plan.tensors if line.tensor.endswith("layers.0.block_sparse_moe.gate.weight")]
    assert router.how == "every row 2 times; plus and minus M u, learned"
    certificate = {"tokens": 256, "sequence_length": 32}  # of tokens, a split takes no fewer than 2,048
    target = aquilamoe.upcycle(tmp_path / "source", tmp_path / "target", certificate=certificate, **arguments)
    assert target.certificate is not None and target.certificate["experts"]["method"] == "split"
    assert target.certificate["tokens"] == 2048
    assert target.record["recipe"]["config"]["calibration_text"] == "embedded"
    assert "nearly function-preserving" in (target.directory / "README.md").read_text()
    assert aquilamoe.upcycle(tmp_path / "source", tmp_path / "target", **arguments).record == target.record
    with pytest.raises(UserError, match=r"made by another recipe \(upcycling.shift 3.0 -> 5.0\)"):
        aquilamoe.upcycle(
            tmp_path / "source",
            tmp_path / "target",
            model=arguments["model"],
            upcycling=arguments["upcycling"] | {"shift": 5},
        )


def test_a_text_that_calibrates_is_another_than_the_one_that_certifies(tmp_path: Path) -> None:
    write_source(tmp_path / "source", mixture(), torch.float32)
    text = tmp_path / "text.txt"
    text.write_text("words")
    how = {"method": "split", "calibration_text": str(text)}
    with pytest.raises(UserError, match=r"^upcycling.calibration_text: .* is the certificate.text too"):
        aquilamoe.upcycle(
            tmp_path / "source",
            tmp_path / "target",
            model={"num_experts": 12},
            upcycling=how,
            certificate={"text": str(text)},
        )
    with pytest.raises(UserError, match=r"^upcycling.calibration_text: .*absent is no file; name a text file$"):
        aquilamoe.upcycle(
            tmp_path / "source",
            tmp_path / "target",
            model={"num_experts": 12},
            upcycling=how | {"calibration_text": str(tmp_path / "absent")},
        )


@pytest.mark.process
def test_a_stage_splits_experts_and_training_continues_with_their_optimizer_state(
    compose: Callable[..., Any], tiny: list[str], tmp_path: Path
) -> None:
    words = ["stages.moe.optimizer_state=reset", "until=more_moe"]
    values = compose(*tiny, *words, f"paths.root={tmp_path}", "tracking.enabled=false")
    stages = values["stages"]
    how = {"method": "split", "direction": "learned", "shift": 3, "calibration_tokens": 512, "common_row": True}
    stages["more"] = stages["scale_out"] | {
        "optimizer_state": "grow",
        "upcycling": stages["scale_out"]["upcycling"] | how,
    }
    experts = stages["scale_out"]["model"]
    for name in ("more", "copies"):
        stages[name] = stages.get(name, stages["scale_out"]) | {
            "model": experts | {"num_experts": 2 * experts["num_experts"]},
            "inputs": stages["scale_out"]["inputs"] | {"source": "moe"},
        }
    stages["more_moe"] = stages["moe"] | {"optimizer_state": "keep"}
    stages["more_moe"]["inputs"] = stages["moe"]["inputs"] | {"source": "more"}
    execute(values, "a test")
    execute(values | {"until": "copies"}, "a test")
    records = {
        path.parent.name.rpartition("-")[0]: json.loads(path.read_text())
        for path in tmp_path.glob("stages/*/record.json")
    }
    metrics = records["more"]["metrics"]
    assert metrics["preserving"] is False and metrics["kl"] < 0.1
    assert metrics["same_originals"] > 0.5 and metrics["z_loss_target"] > 0
    assert records["more_moe"]["metrics"]["loss_end"] > 0
    certificates = {name: _stage_certificate(tmp_path, name) for name in ("more", "copies")}
    assert certificates["more"]["experts"]["same_originals"] == metrics["same_originals"]
    assert certificates["copies"]["preserving"] is False
    assert "experts" not in certificates["copies"], "a recipe of older stores makes other files"
    assert "same_originals" not in records["copies"]["metrics"]


def _stage_certificate(root: Path, stage: str) -> Mapping[str, Any]:
    (path,) = root.glob(f"stages/{stage}-*/certificate.json")
    found: Mapping[str, Any] = json.loads(path.read_text())
    return found
