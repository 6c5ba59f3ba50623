"""The optimizer's state through a growth: against gradients of grown models, and through files."""

import json
import subprocess
import tempfile
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import small_checkpoints
from aquilamoe.checkpoint import tensor_names
from aquilamoe.checkpoint.hf_config import read_config
from aquilamoe.checkpoint.state_dict import load_model
from aquilamoe.config import graph
from aquilamoe.config.growth import Growth
from aquilamoe.config.messages import UserError
from aquilamoe.config.schema import GrowthConfig, ModelConfig, OptimizerConfig, UpcyclingConfig
from aquilamoe.growth import gradient_maps, optimizer_state, rules
from aquilamoe.growth.gradient_maps import GradientMap
from aquilamoe.growth.new_parts import new_parts
from aquilamoe.growth.optimizer_state import FIRST, MOMENTUM, SECOND, STEP, grow_moments
from aquilamoe.growth.scale_out import scale_out
from aquilamoe.growth.scale_up import scale_up
from aquilamoe.growth.units import map_units
from aquilamoe.model.transformer import Decoder
from aquilamoe.pipeline.stage import module
from aquilamoe.training import checkpoint as training_state
from aquilamoe.training import optimizer as optimizers
from effort import examples
from small_checkpoints import growth, write_source

Gradients = dict[str, Tensor]
Command = Callable[..., "subprocess.CompletedProcess[str]"]
How = GrowthConfig | UpcyclingConfig
EXACT = 1e-11  # relative to the largest entry of a tensor
model = partial(
    small_checkpoints.model, vocab_size=24, hidden_size=6, intermediate_size=8, num_attention_heads=4, rms_norm_eps=1e-3
)
upcycling = partial(small_checkpoints.upcycling, router_std=0.5)


def silent(done: int, total: int) -> None:
    """Progress without an observer."""


def resized(source: ModelConfig, how: How, **sizes: Any) -> ModelConfig:
    target = ModelConfig.model_validate({**source.model_dump(), **sizes})
    if isinstance(how, GrowthConfig):
        target = target.model_copy(update={"rms_norm_eps": how.grown_eps(source, target.hidden_size)})
    return target


def gradient(directory: Path, seed: int = 0, rows: int = 2) -> Gradients:
    """Of the mean cross-entropy of a batch, by parameter, in float64."""
    decoder = load_model(directory, torch.float64)
    tokens_bt = torch.randint(0, 24, (rows, 10), generator=torch.Generator().manual_seed(seed))
    decoder(tokens_bt[:, :-1], tokens_bt[:, 1:])[0].backward()
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in decoder.named_parameters()
    }


def write_state(path: Path, gradients: Gradients, step: float = 7.0) -> None:
    """A state whose first moments are the gradient, and its second ones the squares."""
    state = {f"{name}/{STEP}": torch.tensor(step) for name in gradients}
    state |= {f"{name}/{FIRST}": value for name, value in gradients.items()}
    state |= {f"{name}/{SECOND}": value.square() for name, value in gradients.items()}
    save_file(state, path)


class Grown:
    """A source and its target in a folder, both with the gradient of one batch, and the state of the one grown."""

    def __init__(self, source: ModelConfig, target: ModelConfig, how: How, folder: Path, seed: int = 0) -> None:
        write_source(folder / "source", source)
        if isinstance(how, GrowthConfig):
            scale_up(folder / "source", folder / "target", target, how, seed)
        else:
            scale_out(folder / "source", folder / "target", target, how, seed)
        self.before, self.after = gradient(folder / "source"), gradient(folder / "target")
        write_state(folder / "before.safetensors", self.before)
        grow_moments(
            folder / "before.safetensors", folder / "after.safetensors", (source, target), how, seed, progress=silent
        )
        self.state = load_file(folder / "after.safetensors")
        self.maps = dict(gradient_maps.gradient_maps(source, target, how, seed))

    def first(self, name: str) -> Tensor:
        return self.state[f"{name}/{FIRST}"]

    def second(self, name: str) -> Tensor:
        return self.state[f"{name}/{SECOND}"]

    def known(self, name: str) -> Tensor:
        """Where the gradient of a parameter follows from the source's."""
        found = [
            optimizer_state.first(torch.ones_like(part(self.before, gradient_map)), gradient_map) != 0
            for gradient_map in self.maps[name]
        ]
        if not found:
            return torch.zeros_like(self.after[name], dtype=torch.bool)
        return torch.stack(found) if "experts" in name else found[0]

    def error(self, name: str) -> float:
        """The largest difference of a known first moment to the gradient, relative to the largest gradient."""
        return relative((self.first(name) - self.after[name])[self.known(name)], self.after[name])

    def error_of_square(self, name: str) -> float:
        squares = self.after[name].square()
        return relative((self.second(name) - squares)[self.known(name)], squares)


def relative(difference: Tensor, values: Tensor) -> float:
    return (difference.abs().max() / values.abs().max()).item() if difference.numel() else 0.0


def part(gradients: Gradients, gradient_map: GradientMap) -> Tensor:
    return (
        gradients[gradient_map.name]
        if gradient_map.expert is None
        else gradients[gradient_map.name][gradient_map.expert]
    )


@st.composite
def growths(draw: st.DrawFn) -> tuple[ModelConfig, ModelConfig, GrowthConfig]:
    """Small sources with targets of the same function, by copies that are identical."""
    number, one_of = st.integers, st.sampled_from
    groups, slots, times = draw(number(1, 2)), draw(number(1, 3)), draw(number(1, 2))
    # Where key-value heads grow, their copies are read by the same queries: the slots fit.
    new_slots = slots * draw(number(1, 2)) if times > 1 else draw(number(slots, slots + 3))
    hidden, ffn, layers = draw(number(2, 6)), draw(number(2, 6)), draw(number(1, 2))
    norms = draw(one_of(["none", "none", "head"]))
    source = model(
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=groups * slots,
        num_key_value_heads=groups,
        head_dim=draw(one_of([2, 4])),
        rms_norm_eps=draw(one_of([1e-5, 0.1])),
        qkv_bias=norms == "none" and draw(st.booleans()),
        qk_norm=norms,
        tie_word_embeddings=draw(st.booleans()),
    )
    norm = draw(one_of(["exact", "exact", "zero_pad", "copy"]))
    how = growth(
        norm=norm,
        maps=draw(one_of(["circular", "sampled"])),
        depth=draw(one_of(["interpolate", "stack", "stack_top"])),
        new_layers="zero",
    )
    sizes = {
        "hidden_size": hidden * draw(number(1, 3)) if norm == "copy" else hidden + draw(number(0, 2 * hidden)),
        "intermediate_size": ffn + draw(number(0, 2 * ffn)),
        "num_hidden_layers": layers + draw(one_of([0, 0, 1, 3])),
        "num_attention_heads": groups * times * new_slots,
        "num_key_value_heads": groups * times,
        "head_dim": source.head_dim * (draw(one_of([1, 1, 2, 3])) if norms == "none" else 1),
    }
    return source, resized(source, how, **sizes), how


@given(growths())
@settings(max_examples=examples(60), derandomize=True, deadline=None)
def test_moments_of_copies_are_the_gradient_of_the_grown_model_and_its_square(
    case: tuple[ModelConfig, ModelConfig, GrowthConfig],
) -> None:
    source, target, how = case
    assert rules.preserves(how, source, target)
    with tempfile.TemporaryDirectory() as folder:
        grown = Grown(source, target, how, Path(folder))
    new_layers = target.num_hidden_layers - source.num_hidden_layers
    for name in grown.after:
        assert grown.error(name) < EXACT, name
        assert grown.error_of_square(name) < EXACT, name
        assert not grown.first(name)[~grown.known(name)].any(), name
        if how.norm != "zero_pad" and target.head_dim == source.head_dim and not new_layers:
            assert grown.known(name).all(), name


def test_norms_on_queries_and_keys_share_the_epsilon_that_padding_changes(tmp_path: Path) -> None:
    source, how = model(qk_norm="head", qkv_bias=False, rms_norm_eps=0.1), growth(norm="zero_pad")
    grown = Grown(source, resized(source, how, hidden_size=9), how, tmp_path)
    assert all(grown.error(name) < EXACT for name in grown.after)
    assert grown.known(of_layer(0, tensor_names.Q_NORM)).all()


WIDER = {"hidden_size": 9, "intermediate_size": 12, "num_attention_heads": 6}
Q, K, OUT = (f"model.layers.0.{role}" for role in (tensor_names.Q_WEIGHT, tensor_names.K_WEIGHT, tensor_names.O_WEIGHT))
UP, DOWN = (f"model.layers.0.{role}" for role in (tensor_names.UP, tensor_names.DOWN))


def of_layer(layer: int, role: str) -> str:
    return f"model.layers.{layer}.{role}"


def test_what_further_rotary_channels_learn_is_forgotten_and_what_they_cannot_learn_stays_zero(tmp_path: Path) -> None:
    source, how = model(), growth()
    grown = Grown(source, resized(source, how, head_dim=8), how, tmp_path)
    silent_rows = torch.tensor([False, True] * 4).repeat(4)
    assert torch.equal(~grown.known(Q), silent_rows[:, None].expand(32, 6))
    assert grown.after[Q][silent_rows].abs().min() > 0
    assert not grown.after[K][silent_rows[:16]].any()  # a silent query does not determine the key
    for name in (Q, K):
        assert not grown.first(name)[~grown.known(name)].any()
        assert grown.second(name).min() > 0  # a scale stays


def test_padding_has_no_direction_and_the_mean_scale_of_its_tensor(tmp_path: Path) -> None:
    source, how = model(), growth(norm="zero_pad")
    grown = Grown(source, resized(source, how, hidden_size=9), how, tmp_path)
    for name in (tensor_names.EMBEDDING, OUT, DOWN):
        padding = grown.after[name][6:] if name != tensor_names.EMBEDDING else grown.after[name][:, 6:]
        assert padding.abs().max() > 0  # written to, as of now
    for name in (Q, UP, tensor_names.HEAD):
        assert not grown.after[name][:, 6:].any()  # reads nothing yet
        assert torch.allclose(grown.second(name)[:, 6], grown.second(name)[:, :6].mean(dim=1), rtol=1e-12)
    assert not any(grown.first(name)[..., 6:].any() for name in (Q, UP, tensor_names.HEAD, tensor_names.EMBEDDING))
    assert not any(grown.first(name)[6:].any() for name in (OUT, DOWN, tensor_names.FINAL_NORM))
    assert torch.allclose(grown.second(OUT)[8], grown.second(OUT)[:6].mean(dim=0), rtol=1e-12)
    # By token: what occurs often has another scale than what does not occur.
    assert torch.allclose(
        grown.second(tensor_names.EMBEDDING)[:, 7], grown.second(tensor_names.EMBEDDING)[:, :6].mean(dim=1)
    )


def test_a_silent_layer_forgets_directions_of_the_two_tensors_that_learn_and_the_others_have_none(
    tmp_path: Path,
) -> None:
    source, how = model(), growth(new_layers="zero")
    grown = Grown(source, resized(source, how, num_hidden_layers=3), how, tmp_path)  # 0, 0, 1
    for role in tensor_names.role_shapes(source, 0):
        new = of_layer(1, role)
        assert not grown.first(new).any()
        assert torch.equal(grown.second(new), grown.second(of_layer(0, role)))
        assert bool(grown.after[new].any()) == (role in (tensor_names.O_WEIGHT, tensor_names.DOWN))


@pytest.mark.parametrize("new_layers", ["copy", "scaled"])
def test_further_copies_of_a_layer_forget_directions_and_the_first_keep_them(new_layers: str, tmp_path: Path) -> None:
    source, how = model(), growth(new_layers=new_layers)
    grown = Grown(source, resized(source, how, num_hidden_layers=4), how, tmp_path)
    for role in tensor_names.role_shapes(source, 0):
        for layer in (0, 1):
            old, new = of_layer(2 * layer, role), of_layer(2 * layer + 1, role)
            assert torch.equal(grown.first(old), grown.before[of_layer(layer, role)])
            assert not grown.first(new).any() and torch.equal(grown.second(old), grown.second(new))


def mean_over_copies(tensor: Tensor, dim: int, units: Any) -> Tensor:
    size = [units.num_sources if d == dim else length for d, length in enumerate(tensor.shape)]
    total = torch.zeros(size, dtype=tensor.dtype).index_add(dim, torch.tensor(units.sources), tensor)
    return total / torch.tensor(units.counts).view([-1 if d == dim else 1 for d in range(tensor.dim())])


@pytest.mark.parametrize("tied", [False, True])
def test_noise_makes_copies_differ_but_their_mean_is_the_gradient_that_was_mapped(tied: bool, tmp_path: Path) -> None:
    source, how = model(tie_word_embeddings=tied), growth(noise=0.5)
    target = resized(source, how, **WIDER)
    grown, units = Grown(source, target, how, tmp_path), map_units(source, target, how)
    apart = set()
    for name, found in grown.after.items():
        layer, role = gradient_maps.split(name)
        rows = units.residual if "norm" in name else units.rows(role) if layer is not None else None
        dim, copied = (1, units.residual) if role == tensor_names.EMBEDDING else (0, rows)
        if copied is None or copied.is_identity:
            assert grown.error(name) < EXACT, name
            continue
        mapped = grown.first(name)
        means = mean_over_copies(mapped, dim, copied), mean_over_copies(found, dim, copied)
        assert relative(means[0] - means[1], found) < EXACT, name
        alone = torch.tensor(copied.copies) == 1
        assert relative((mapped - found).movedim(dim, 0)[alone], found) < EXACT, name
        apart |= {role} if grown.error(name) > 1e-3 else set()
    assert {
        tensor_names.EMBEDDING,
        tensor_names.INPUT_NORM,
        tensor_names.UP,
        tensor_names.DOWN,
        tensor_names.O_WEIGHT,
        tensor_names.Q_WEIGHT,
    } <= apart
    assert (tensor_names.FINAL_NORM in apart) != tied  # a tied head has no noise
    assert apart.isdisjoint(
        {tensor_names.K_WEIGHT, tensor_names.V_WEIGHT, tensor_names.K_BIAS, tensor_names.V_BIAS}
    )  # no copies of these


def test_key_value_heads_that_different_queries_read_share_the_gradient_of_one_exactly_in_the_sum(
    tmp_path: Path,
) -> None:
    source, how = model(num_attention_heads=3, num_key_value_heads=1), growth()
    target = resized(source, how, num_attention_heads=4, num_key_value_heads=2)  # queries 0, 1 and 2, 0
    grown, units = Grown(source, target, how, tmp_path), map_units(source, target, how)
    for role in (tensor_names.K_WEIGHT, tensor_names.V_WEIGHT, tensor_names.V_BIAS):
        name = of_layer(0, role)
        means = [mean_over_copies(t, 0, units.k_channels) for t in (grown.first(name), grown.after[name])]
        assert relative(means[0] - means[1], means[1]) < EXACT
        assert grown.error(name) > 1e-3
    assert grown.error(Q) < EXACT


@pytest.mark.parametrize("tied", [False, True])
def test_new_tokens_have_no_direction_and_a_scale_where_they_learn_at_once(tied: bool, tmp_path: Path) -> None:
    source, how = model(tie_word_embeddings=tied), growth()
    grown = Grown(source, resized(source, how, vocab_size=27), how, tmp_path)
    embedding = grown.second(tensor_names.EMBEDDING)
    assert not grown.first(tensor_names.EMBEDDING)[24:].any()
    assert bool(grown.after[tensor_names.EMBEDDING][24:].any()) == bool(embedding[24:].any()) == tied
    if not tied:
        assert not grown.first(tensor_names.HEAD)[24:].any() and grown.after[tensor_names.HEAD][24:].any()
        head = grown.second(tensor_names.HEAD)
        assert torch.allclose(head[25], head[:24].mean(dim=0), rtol=1e-12)


@pytest.mark.parametrize(
    ("method", "scope", "rows", "columns"),
    [
        (
            "aki",
            "all",
            {tensor_names.Q_WEIGHT, tensor_names.K_WEIGHT, tensor_names.O_WEIGHT, tensor_names.UP, tensor_names.DOWN},
            set(),
        ),
        ("aki", "inner", {tensor_names.Q_WEIGHT, tensor_names.K_WEIGHT, tensor_names.UP}, set()),
        (
            "aki",
            "transplant",
            {tensor_names.Q_WEIGHT, tensor_names.K_WEIGHT, tensor_names.UP},
            {tensor_names.O_WEIGHT, tensor_names.DOWN},
        ),
        ("aki_pro", "all", {tensor_names.Q_WEIGHT, tensor_names.O_WEIGHT, tensor_names.UP, tensor_names.DOWN}, set()),
    ],
)
def test_what_comes_from_the_layer_above_brings_no_direction_and_what_is_its_own_does(
    method: str, scope: str, rows: set[str], columns: set[str], tmp_path: Path
) -> None:
    source, how = model(), growth(method=method, scope=scope)
    target = (
        resized(source, how, **WIDER, num_key_value_heads=2)
        if method == "aki_pro"
        else resized(source, how, hidden_size=9, intermediate_size=12, num_attention_heads=8, num_key_value_heads=4)
    )
    grown, units = Grown(source, target, how, tmp_path), map_units(source, target, how)
    plain = dict(gradient_maps.gradient_maps(source, target, growth(), 0))
    for role in (
        tensor_names.Q_WEIGHT,
        tensor_names.K_WEIGHT,
        tensor_names.O_WEIGHT,
        tensor_names.UP,
        tensor_names.DOWN,
    ):
        row_units, column_units = units.rows(role), units.columns(role)
        assert row_units is not None and column_units is not None
        for layer, has_upper in ((0, True), (1, False)):
            name = of_layer(layer, role)
            as_fpi = optimizer_state.first(grown.before[name], plain[name][0])
            foreign = torch.zeros(as_fpi.shape, dtype=torch.bool)
            if has_upper and role in rows:
                foreign[torch.tensor(row_units.is_new)] = True
            if has_upper and role in columns:
                foreign[:, torch.tensor(column_units.is_new)] = True
            assert foreign.any() == (has_upper and role in rows | columns)
            assert torch.equal(grown.first(name), as_fpi.masked_fill(foreign, 0)), name
            assert torch.equal(grown.second(name), optimizer_state.second(grown.before[name].square(), plain[name][0]))


def test_a_model_that_is_drawn_begins_as_any_other(tmp_path: Path) -> None:
    source, how = model(), growth(method="random")
    grown = Grown(source, resized(source, how, **WIDER), how, tmp_path)
    assert set(grown.state) == {f"{name}/{key}" for name in grown.after for key in (STEP, FIRST, SECOND)}
    assert not any(tensor.any() for tensor in grown.state.values())


EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": None}
PARTS = {"num_experts": 6, "num_experts_per_tok": 4, "moe_intermediate_size": 4}  # 3 copies in 2 parts


@pytest.mark.parametrize("method", ["copy", "permute"])
@pytest.mark.parametrize("sizes", [EXPERTS, PARTS])
def test_experts_have_the_gradient_of_the_feed_forward_in_the_sum_and_all_else_has_its_own(
    sizes: dict[str, Any], method: str, tmp_path: Path
) -> None:
    source, how = model(), upcycling(method=method)
    grown = Grown(source, resized(source, how, **sizes), how, tmp_path)
    for name, found in grown.after.items():
        if name.endswith("mlp.gate.weight"):
            assert grown.state[f"{name}/{STEP}"] == 0 and not grown.second(name).any()
            assert not grown.first(name).any()
            assert (found.abs().max() < 1e-12) == (sizes is EXPERTS)  # whole ones are equal, whichever is chosen
        elif "experts" in name:
            back = [torch.zeros_like(part(grown.before, gradient_map)) for gradient_map in grown.maps[name]]
            sums = [torch.zeros(()), torch.zeros(())]
            for index, tensors in enumerate((grown.first(name), found)):
                for expert, gradient_map in enumerate(grown.maps[name]):
                    axis, dim = (gradient_map.columns, 1) if "down" in name else (gradient_map.rows, 0)
                    assert axis.index is not None
                    sums[index] = sums[index] + back[expert].index_add(dim, axis.index, tensors[expert])
            assert relative(sums[0] - sums[1], sums[1]) < EXACT, name
            assert grown.error(name) > 1e-2  # not all of them get equally many tokens
        else:
            assert grown.state[f"{name}/{STEP}"] == 7
            assert relative(grown.first(name) - found, found) < EXACT, name


def test_more_experts_of_experts_have_the_gradient_and_so_has_their_router(tmp_path: Path) -> None:
    source, how = model(num_experts=3, num_experts_per_tok=1, moe_intermediate_size=8), upcycling()
    grown = Grown(source, resized(source, how, num_experts=6, num_experts_per_tok=2), how, tmp_path)
    for name, found in grown.after.items():
        assert grown.known(name).all()
        if found.abs().max() < 1e-15:  # top-1 of Mixtral's order: a share of 1, whatever the score
            assert name.endswith("mlp.gate.weight")
        else:
            assert grown.error(name) < EXACT and grown.error_of_square(name) < EXACT, name


@pytest.mark.parametrize("norm_topk_prob", [False, True])
def test_routers_of_more_experts_share_the_gradient_of_a_score(norm_topk_prob: bool, tmp_path: Path) -> None:
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "norm_topk_prob": norm_topk_prob}
    source, how = model(**sizes), upcycling()
    grown = Grown(source, resized(source, how, num_experts=8, num_experts_per_tok=4), how, tmp_path)
    name = of_layer(0, tensor_names.ROUTER)
    assert grown.after[name].abs().max() > 1e-6
    assert all(grown.error(name) < EXACT and grown.error_of_square(name) < EXACT for name in grown.after)


def test_neurons_that_are_drawn_again_bring_no_direction(tmp_path: Path) -> None:
    source, how = model(), upcycling(method="drop", drop_ratio=0.5)
    target = resized(source, how, **EXPERTS)
    grown = Grown(source, target, how, tmp_path)
    dense = dict(load_model(tmp_path / "source", torch.float64).named_parameters())
    experts = dict(load_model(tmp_path / "target", torch.float64).named_parameters())
    for role in ("gate_proj", "up_proj", "down_proj"):
        name, old = f"model.layers.0.mlp.experts.{role}", dense[f"model.layers.0.mlp.{role}.weight"]
        drawn = experts[name] != old
        assert drawn.float().mean() == 0.5
        assert torch.equal(grown.first(name) == 0, drawn)
        assert grown.second(name).min() > 0


def test_the_variance_of_an_expert_falls_less_than_the_square_of_its_mean(tmp_path: Path) -> None:
    source, target = model(), resized(model(), upcycling(), **EXPERTS)
    dense = {name: torch.ones(shape) for name, shape in gradient_maps.parameter_shapes(source).items()}
    write_state(tmp_path / "before", dense)  # all alike: v = m ** 2
    state = load_file(tmp_path / "before")
    name, up = of_layer(0, tensor_names.UP), "model.layers.0.mlp.experts.up_proj"
    save_file(state | {f"{name}/{SECOND}": 5 * dense[name]}, tmp_path / "noisy")
    for file, expected in (("before", 1 / 36), ("noisy", 1 / 36 + 4 / (6 * 2))):
        grow_moments(tmp_path / file, tmp_path / "after", (source, target), upcycling(), 0, progress=silent)
        grown = load_file(tmp_path / "after")
        assert grown[f"{up}/{FIRST}"].unique().tolist() == pytest.approx([1 / 6])
        assert grown[f"{up}/{SECOND}"].unique().tolist() == pytest.approx([expected])
        assert grown[f"{of_layer(0, tensor_names.O_WEIGHT)}/{SECOND}"].unique().tolist() == [1]


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999)])
def test_the_first_update_of_what_was_forgotten_is_no_larger_than_a_learning_rate(
    betas: tuple[float, float], tmp_path: Path
) -> None:
    source, how = model(), growth(method="aki")
    target = resized(source, how, **WIDER)
    grown = Grown(source, target, how, tmp_path / "exact")
    training = tmp_path / "stage" / training_state.TRAINING
    training.mkdir(parents=True)
    late = {name: torch.full_like(value, 1e4) if name.endswith(STEP) else value for name, value in grown.state.items()}
    adamw = OptimizerConfig(name="adamw", momentum=0.95, betas=betas, eps=1e-8, weight_decay=0.0, max_grad_norm=1.0)

    def largest_update(state: dict[str, Tensor]) -> float:
        save_file({name: value.float() for name, value in state.items()}, training / training_state.MOMENTS)
        decoder = Decoder(target)
        optimizer = optimizers.build(decoder, adamw, 1.0)
        training_state.load_moments(tmp_path / "stage", decoder, optimizer)
        up = dict(decoder.named_parameters())[UP]
        up.data.zero_()
        forgotten = grown.first(UP) == 0
        assert 0 < forgotten.sum() < forgotten.numel()
        up.grad = 1.5 * grown.second(UP).sqrt().float()  # of the scale that it was
        optimizer.step()
        return up.data[forgotten].abs().max().item()

    assert largest_update(late) < 0.2
    forgetful = late | {f"{UP}/{SECOND}": grown.second(UP).masked_fill(grown.first(UP) == 0, 0)}
    assert largest_update(forgetful) == pytest.approx((1 - betas[0]) / (1 - betas[1]) ** 0.5, rel=1e-2)


@pytest.mark.parametrize("how", [growth(), growth(noise=0.5, new_layers="zero"), upcycling()])
def test_an_asymmetric_state_is_the_grown_one_of_old_weights_and_zero_of_new_ones(how: How, tmp_path: Path) -> None:
    source = model()
    target = resized(source, how, **(WIDER if isinstance(how, GrowthConfig) else EXPERTS))
    state, configs = state_of(tmp_path, source), (source, target)
    for name, asymmetric in (("grown", False), ("asymmetric", True)):
        grow_moments(state, tmp_path / name, configs, how, 0, progress=silent, asymmetric=asymmetric)
    grown, found = load_file(tmp_path / "grown"), load_file(tmp_path / "asymmetric")
    assert grown.keys() == found.keys()
    for name, marks in new_parts([Growth(source, target, how, 0)]).items():
        assert torch.equal(found[f"{name}/{STEP}"], grown[f"{name}/{STEP}"])
        for key in (FIRST, SECOND):
            moment = found[f"{name}/{key}"]
            is_new = marks.part(tuple(slice(0, size) for size in moment.shape)).expand(moment.shape)
            assert torch.equal(moment, grown[f"{name}/{key}"].masked_fill(is_new, 0))
        assert is_new.all() or not is_new.any() or (moment == 0).any()


@pytest.mark.parametrize(
    ("betas", "refused"), [("[0.9,0.95]", False), ("[0.9,0.99]", False), ("[0.9,0.999]", True), ("[0.9,1.0]", True)]
)
def test_moments_of_zero_are_kept_only_with_betas_that_bound_the_first_update(
    compose: Callable[..., dict[str, Any]], betas: str, refused: bool
) -> None:
    words = ["stages.scale_up.optimizer_state=grow_asymmetric", "stages.dense.optimizer_state=keep"]
    parsed = graph.parse(compose(*words, f"stages.dense.optimizer.betas={betas}"))
    if not refused:
        graph.build(parsed)
        return
    with pytest.raises(UserError, match=r"^stages.dense.optimizer_state: 'scale_up' leaves moments of zero .*; use"):
        graph.build(parsed)


@pytest.mark.parametrize("how", [growth(noise=0.5), growth(method="random"), upcycling()])
def test_muons_momentum_is_mapped_as_a_first_moment(how: How, tmp_path: Path) -> None:
    source = model()
    target = resized(source, how, **(WIDER if isinstance(how, GrowthConfig) else EXPERTS))
    muon = OptimizerConfig(name="muon", momentum=0.95, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, max_grad_norm=1.0)
    old, new = Decoder(source), Decoder(target)
    for parameter in old.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    optimizer = optimizers.build(old, muon, 0.1)
    optimizer.step()
    training_state.save(tmp_path / "old", old, optimizer, 1)
    (tmp_path / "new" / training_state.TRAINING).mkdir(parents=True)
    before, after = (tmp_path / folder / training_state.TRAINING / training_state.MOMENTS for folder in ("old", "new"))
    grow_moments(before, after, (source, target), how, 0, progress=silent)
    optimizer = optimizers.build(new, muon, 0.1)
    training_state.load_moments(tmp_path / "new", new, optimizer)
    found, state = load_file(after), load_file(before)
    assert set(optimizers.read_state(new, optimizer)) == set(found)
    for name, maps in gradient_maps.gradient_maps(source, target, how, 0):
        momentum = found.get(f"{name}/{MOMENTUM}")
        if momentum is not None:
            mapped = [
                optimizer_state.first(state[f"{gradient_map.name}/{MOMENTUM}"], gradient_map) for gradient_map in maps
            ]
            expected = torch.stack(mapped) if len(mapped) > 1 else mapped[0] if mapped else torch.zeros_like(momentum)
            assert torch.equal(momentum, expected)


def state_of(folder: Path, config: ModelConfig) -> Path:
    generator = torch.Generator().manual_seed(0)
    shapes = gradient_maps.parameter_shapes(config)
    write_state(folder / "state", {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()})
    return folder / "state"


def test_a_grown_state_is_always_the_same_bytes_and_leaves_nothing_else(tmp_path: Path) -> None:
    source, how = model(), growth(noise=0.5, maps="sampled")
    target, path = resized(source, how, **WIDER), state_of(tmp_path, source)
    for name in ("one", "two"):
        grow_moments(path, tmp_path / name, (source, target), how, 3, progress=silent)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    grow_moments(path, tmp_path / "other", (source, target), how, 4, progress=silent)
    assert (tmp_path / "other").read_bytes() != (tmp_path / "one").read_bytes()
    assert {file.name for file in tmp_path.iterdir()} == {"state", "one", "two", "other"}


def test_one_tensor_of_the_source_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, how = model(num_hidden_layers=3), upcycling()
    path = state_of(tmp_path, source)
    living: list[weakref.ref[Tensor]] = []
    most, read = 0, optimizer_state._read

    def watched(*arguments: Any) -> Tensor:
        nonlocal most
        found = read(*arguments)
        living.append(weakref.ref(found))
        most = max(most, sum(reference() is not None for reference in living))
        return found

    monkeypatch.setattr(optimizer_state, "_read", watched)
    grow_moments(path, tmp_path / "grown", (source, resized(source, how, **EXPERTS)), how, 0, progress=silent)
    assert len(living) > 100 and most <= 2  # both moments, where the second follows from the two


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "there is no optimizer state; set optimizer_state=reset"),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "is damaged ("),
        (
            lambda path: write_state(path, {tensor_names.EMBEDDING: torch.ones(24, 6)}),
            "is missing, the model's is (); take weights and",
        ),
        (lambda path: state_of(path.parent, model(hidden_size=8)), "is (24, 8), the model's is (24, 6); take weights"),
    ],
)
def test_a_state_that_cannot_be_grown_is_one_line_with_what_to_do(
    damage: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    source, how = model(num_attention_heads=3, num_key_value_heads=3, head_dim=2), growth()
    path = state_of(tmp_path, source)
    damage(path)
    with pytest.raises(UserError) as raised:
        grow_moments(path, tmp_path / "grown", (source, resized(source, how, hidden_size=9)), how, 0, progress=silent)
    assert message in str(raised.value) and str(path) in str(raised.value) and "\n" not in str(raised.value)
    assert not (tmp_path / "grown").exists()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, command: Command, tiny: list[str]) -> dict[str, Path]:
    """Directories of the stages that train or grow, after a run in which the state goes through both growths."""
    folder = tmp_path_factory.mktemp("runs")
    grow = [f"stages.{stage}.optimizer_state=grow" for stage in ("scale_up", "scale_out")]
    keep = [f"stages.{stage}.optimizer_state=keep" for stage in ("dense", "moe")]
    completed = command(
        *tiny, "growth=fpi", "growth.new_layers=zero", *grow, *keep, "tracking.enabled=false", cwd=folder
    )
    assert completed.returncode == 0, completed.stderr
    stages = ("prepare", "scale_up", "dense", "scale_out", "moe")
    found = {stage: list((folder / "runs" / "stages").glob(f"{stage}-*")) for stage in stages}
    assert all(len(directories) == 1 for directories in found.values())
    return {stage: directories[0] for stage, directories in found.items()}


@pytest.mark.process
def test_the_command_trains_on_with_a_state_that_went_through_both_growths(runs: dict[str, Path]) -> None:
    states = {stage: load_file(runs[stage] / training_state.TRAINING / training_state.MOMENTS) for stage in runs}
    embedding, router = f"{tensor_names.EMBEDDING}/{STEP}", f"{of_layer(0, tensor_names.ROUTER)}/{STEP}"
    steps = {stage: int(state[embedding]) for stage, state in states.items()}
    assert steps == {"prepare": 16, "scale_up": 16, "dense": 24, "scale_out": 24, "moe": 32}
    assert int(states["scale_out"][router]) == 0 and int(states["moe"][router]) == 8
    for stage in ("scale_up", "scale_out"):
        record = json.loads((runs[stage] / "record.json").read_text())
        assert f"{training_state.TRAINING}/{training_state.MOMENTS}" in record["files"]
        config = read_config(runs[stage] / "model")
        shapes = gradient_maps.parameter_shapes(config)
        assert {name.rpartition("/")[0] for name in states[stage]} == set(shapes)
        assert all(states[stage][f"{name}/{FIRST}"].shape == shape for name, shape in shapes.items())


def test_a_shared_expert_takes_half_of_the_gradient_and_dense_layers_all_of_theirs(tmp_path: Path) -> None:
    source, how = model(intermediate_size=12), upcycling()  # 8 would mark the absence of a shared expert
    sizes = {"shared_expert_intermediate_size": 12, "mlp_only_layers": (1,)}
    grown = Grown(source, resized(source, how, **EXPERTS, **sizes), how, tmp_path)
    for name, found in grown.after.items():
        mapped = grown.first(name)
        if name in (of_layer(0, tensor_names.SHARED_ROUTER), of_layer(0, tensor_names.ROUTER)):
            assert not mapped.any() and grown.state[f"{name}/{STEP}"] == 0
        elif "mlp.experts." in name:
            assert relative(mapped.sum(dim=0) - found.sum(dim=0), found.sum(dim=0)) < EXACT, name
        else:
            assert relative(mapped - found, found) < EXACT, name


def test_a_plan_counts_the_state_that_a_growth_writes(compose: Callable[..., dict[str, Any]]) -> None:
    for stage in ("scale_up", "scale_out"):
        bytes_of = {}
        for how in ("reset", "grow"):
            words = [f"stages.{name}.optimizer_state={how}" for name in ("scale_up", "scale_out")]
            node = graph.build(graph.parse(compose(*words)))[stage]
            bytes_of[how] = module(stage).estimate(node).disk_bytes
        assert node.model is not None
        assert bytes_of["grow"] - bytes_of["reset"] == 8 * node.model.num_params
