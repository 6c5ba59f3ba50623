"""Faults put into grown checkpoints on disk: a certificate refuses each of them, and names the layer that it is in."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from aquilamoe.checkpoint import reader as reading
from aquilamoe.checkpoint import tensor_names
from aquilamoe.checkpoint.hf_config import read_config
from aquilamoe.checkpoint.state_dict import save_model
from aquilamoe.config.messages import UserError
from aquilamoe.config.schema import GrowthConfig, ModelConfig, UpcyclingConfig
from aquilamoe.growth import rules
from aquilamoe.growth.alignment import align
from aquilamoe.growth.bounds import default_tolerance
from aquilamoe.growth.certificate import certify
from aquilamoe.growth.claim import Claim
from aquilamoe.growth.depth import map_layers
from aquilamoe.growth.scale_out import scale_out
from aquilamoe.growth.scale_up import scale_up
from aquilamoe.growth.units import map_units
from aquilamoe.model.transformer import Decoder

SEED = 5
TOKENS_BT = torch.arange(120).view(6, 20) * 7 % 64
# Query heads make a square matrix, and so do experts: only their values distinguish them from their transposes.
SOURCE = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=32,
    rope_theta=1e4,
    rms_norm_eps=1e-5,
    initializer_range=0.02,
    qkv_bias=True,
    tie_word_embeddings=False,
    num_experts=0,
    num_experts_per_tok=0,
    moe_intermediate_size=0,
)
WIDER = {"hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 6, "num_attention_heads": 6}
FPI = GrowthConfig(
    method="fpi", scope="all", norm="exact", maps="circular", noise=0.5, depth="interpolate", new_layers="zero"
)
COPY = UpcyclingConfig(method="copy", noise=0.0, drop_ratio=0.0, router_init="normal", router_std=0.02)
SPARSE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

Tensors = dict[str, Tensor]


@torch.no_grad()
def write_source(directory: Path, config: ModelConfig = SOURCE, dtype: torch.dtype = torch.float32) -> Path:
    """A checkpoint as training leaves it: no gain is one, no bias zero, and every part of the network matters."""
    decoder = Decoder(config).double()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in decoder.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        is_matrix = parameter.dim() > 1 and "embed" not in name
        parameter.copy_(
            noise / parameter.shape[-1] ** 0.5 if is_matrix else noise * 0.5 + (1.0 if "norm" in name else 0.0)
        )
    save_model(decoder, directory, dtype)
    return directory


def changed(config: ModelConfig, how: GrowthConfig, **sizes: Any) -> ModelConfig:
    """The source with other sizes, and the epsilon that goes with them."""
    target = config.model_copy(update=sizes)
    return target.model_copy(update={"rms_norm_eps": how.grown_eps(config, target.hidden_size)})


def judge(directory: Path, growth: GrowthConfig | UpcyclingConfig, tolerance: float = 1e-3) -> dict[str, Any]:
    """The certificate of the growth from `source` to `target`, both in the directory."""
    source, target = directory / "source", directory / "target"
    assert rules.preserves(growth, read_config(source), read_config(target))
    return certify(source, target, TOKENS_BT, Claim(preserving=True, tolerance=tolerance, growth=growth, seed=SEED))


def refusal(directory: Path, growth: GrowthConfig | UpcyclingConfig, tolerance: float = 1e-3) -> str:
    with pytest.raises(UserError) as error:
        judge(directory, growth, tolerance)
    message = str(error.value)
    assert message.startswith("certificate: the growth claims to keep the function, but ")
    assert "logits differ by up to " in message
    assert "\n" not in message
    return message


def damage(directory: Path, change: Callable[[Tensors], object]) -> None:
    """Change tensors of a checkpoint in its files."""
    config = read_config(directory)
    with reading.Reader(directory) as reader:
        dtype = reader.dtype(tensor_names.EMBEDDING)
        tensors = {name: reader.get(name).clone() for name in tensor_names.tensor_shapes(config)}
    change(tensors)
    reading.write(directory, tensor_names.tensor_shapes(config), dtype, iter(tensors.items()))


def role(layer: int, name: str) -> str:
    return f"model.layers.{layer}.{name}"


@pytest.fixture
def grown(tmp_path: Path) -> Path:
    """4 layers grown to 6: 0, 0 again, 1, 2, 2 again, 3; with exact norms and noise."""
    write_source(tmp_path / "source")
    scale_up(tmp_path / "source", tmp_path / "target", changed(SOURCE, FPI, **WIDER), FPI, SEED)
    assert map_layers(SOURCE, SOURCE.model_copy(update=WIDER), FPI).sources == (0, 0, 1, 2, 2, 3)
    return tmp_path


@pytest.fixture
def upcycled(tmp_path: Path) -> Path:
    write_source(tmp_path / "source")
    scale_out(tmp_path / "source", tmp_path / "target", SOURCE.model_copy(update=SPARSE), COPY, SEED)
    return tmp_path


def swap_heads(tensors: Tensors, layer: int) -> None:
    for name in (tensor_names.Q_WEIGHT, tensor_names.Q_BIAS):
        heads = tensors[role(layer, name)].unflatten(0, (-1, SOURCE.head_dim))
        heads[[0, 1]] = heads[[1, 0]]


def test_a_growth_as_it_should_be_passes_and_every_layer_agrees(grown: Path) -> None:
    certificate = judge(grown, FPI)
    assert certificate["passed"] is True
    assert certificate["ties"] is False
    assert len(certificate["layers"]) == 7
    assert max(certificate["layers"]) < 1e-5
    assert certificate["layers"][2] == certificate["layers"][5] == 0  # the silent copies add nothing at all


def test_two_exchanged_heads_are_caught_in_their_layer(grown: Path) -> None:
    damage(grown / "target", lambda tensors: swap_heads(tensors, 3))
    assert "diverge in layer 3 of the target, which differs from layer 2 of the source by " in refusal(grown, FPI)


def test_columns_that_are_not_divided_by_their_copies_are_caught_in_their_layer(grown: Path) -> None:
    residual = map_units(SOURCE, SOURCE.model_copy(update=WIDER), FPI, SEED).residual
    copies = torch.tensor(residual.copies, dtype=torch.float32)
    damage(grown / "target", lambda tensors: tensors[role(2, tensor_names.UP)].mul_(copies))
    assert "diverge in layer 2 of the target, which differs from layer 1 of the source by " in refusal(grown, FPI)


def test_one_undivided_column_is_caught_in_its_layer(grown: Path) -> None:
    damage(grown / "target", lambda tensors: tensors[role(5, tensor_names.DOWN)][:, 33].mul_(2))
    assert "diverge in layer 5 of the target, which differs from layer 3 of the source by " in refusal(grown, FPI)


def test_the_tensors_of_another_layer_are_caught_where_they_are(grown: Path) -> None:
    def replace(tensors: Tensors) -> None:
        for name in tensor_names.role_shapes(SOURCE, 0):
            tensors[role(2, name)].copy_(tensors[role(3, name)])

    damage(grown / "target", replace)
    assert "diverge in layer 2 of the target, which differs from layer 1 of the source by " in refusal(grown, FPI)


@pytest.mark.parametrize("name", [tensor_names.INPUT_NORM, tensor_names.POST_ATTENTION_NORM])
def test_a_gain_that_is_not_adjusted_is_caught_in_its_layer(grown: Path, name: str) -> None:
    residual = map_units(SOURCE, SOURCE.model_copy(update=WIDER), FPI, SEED).residual
    with reading.Reader(grown / "source") as reader:
        plain = reader.get(role(2, name))[list(residual.sources)]
        damage(grown / "target", lambda tensors: tensors[role(3, name)].copy_(plain))
    assert "diverge in layer 3 of the target, which differs from layer 2 of the source by " in refusal(grown, FPI)


def test_a_further_copy_that_is_not_silent_is_caught_and_called_so(grown: Path) -> None:
    def wake(tensors: Tensors) -> None:
        tensors[role(4, tensor_names.DOWN)].copy_(tensors[role(3, tensor_names.DOWN)] * 1e-3)

    damage(grown / "target", wake)
    assert "diverge in layer 4 of the target, a further copy that should be silent and changes " in refusal(grown, FPI)


def test_one_wrong_embedding_is_caught_before_the_first_layer(grown: Path) -> None:
    damage(grown / "target", lambda tensors: tensors[tensor_names.EMBEDDING][7].mul_(1.1))
    assert "they diverge in the embedding, by " in refusal(grown, FPI)


@pytest.mark.parametrize("name", [tensor_names.FINAL_NORM, tensor_names.HEAD])
def test_a_fault_behind_the_last_layer_is_placed_there(grown: Path, name: str) -> None:
    damage(grown / "target", lambda tensors: tensors[name][7].mul_(1.1))
    assert "they diverge in the final norm or the head; " in refusal(grown, FPI)


def test_the_first_of_two_faults_is_the_one_that_is_named(grown: Path) -> None:
    def break_two(tensors: Tensors) -> None:
        swap_heads(tensors, 5)
        swap_heads(tensors, 2)

    damage(grown / "target", break_two)
    assert "diverge in layer 2 of the target, " in refusal(grown, FPI)


def test_a_weight_that_is_no_number_is_caught_in_its_layer(grown: Path) -> None:
    damage(grown / "target", lambda tensors: tensors[role(3, tensor_names.GATE)][0].fill_(math.nan))
    assert "diverge in layer 3 of the target, which differs from layer 2 of the source by nan " in refusal(grown, FPI)


def test_padding_that_is_not_zero_is_caught_in_its_layer(tmp_path: Path) -> None:
    lemon = FPI.model_copy(update={"method": "lemon", "norm": "zero_pad"})
    write_source(tmp_path / "source")
    scale_up(tmp_path / "source", tmp_path / "target", changed(SOURCE, lemon, **WIDER), lemon, SEED)
    assert max(judge(tmp_path, lemon)["layers"]) < 1e-5
    damage(tmp_path / "target", lambda tensors: tensors[role(2, tensor_names.DOWN)][40].fill_(0.01))
    assert "diverge in layer 2 of the target, which differs from layer 1 of the source by " in refusal(tmp_path, lemon)


@pytest.mark.parametrize("name", [tensor_names.GATE, tensor_names.UP, tensor_names.DOWN])
def test_a_transposed_expert_is_caught_in_its_layer(upcycled: Path, name: str) -> None:
    expert = tensor_names.layer_name(read_config(upcycled / "target"), 2, tensor_names.expert_role(3, name))
    damage(upcycled / "target", lambda tensors: tensors[expert].copy_(tensors[expert].T.clone()))
    assert "diverge in layer 2 of the target, which differs from layer 2 of the source by " in refusal(upcycled, COPY)


def test_experts_that_exchanged_their_down_projections_are_caught_in_their_layer(tmp_path: Path) -> None:
    """Permuted experts: each has its neurons in an order of its own."""
    permute = COPY.model_copy(update={"method": "permute"})
    write_source(tmp_path / "source")
    scale_out(tmp_path / "source", tmp_path / "target", SOURCE.model_copy(update=SPARSE), permute, SEED)
    assert judge(tmp_path, permute)["passed"] is True
    config = read_config(tmp_path / "target")
    first, second = (
        tensor_names.layer_name(config, 1, tensor_names.expert_role(expert, tensor_names.DOWN)) for expert in (0, 2)
    )

    def exchange(tensors: Tensors) -> None:
        tensors[first], tensors[second] = tensors[second], tensors[first]

    damage(tmp_path / "target", exchange)
    assert "diverge in layer 1 of the target, which differs from layer 1 of the source " in refusal(tmp_path, permute)


def test_the_claim_holds_for_any_router_of_equal_experts(upcycled: Path) -> None:
    config = read_config(upcycled / "target")
    generator = torch.Generator().manual_seed(1)

    def disturb(tensors: Tensors) -> None:
        for layer in range(config.num_hidden_layers):
            router = tensors[tensor_names.layer_name(config, layer, tensor_names.ROUTER)]
            router.add_(torch.randn(router.shape, generator=generator))

    damage(upcycled / "target", disturb)
    certificate = judge(upcycled, COPY)
    assert certificate["passed"] is True
    assert max(certificate["layers"]) < 1e-5


def more_experts(directory: Path) -> ModelConfig:
    """A Mixture of Experts, upcycled to twice the experts."""
    source = SOURCE.model_copy(update=SPARSE)
    target = source.model_copy(update={"num_experts": 8, "num_experts_per_tok": 4})
    write_source(directory / "source", source)
    scale_out(directory / "source", directory / "target", target, COPY, SEED)
    return target


def test_a_router_of_experts_that_differ_is_held_to_the_sources(tmp_path: Path) -> None:
    config = more_experts(tmp_path)
    assert max(judge(tmp_path, COPY)["layers"]) < 1e-5
    router = tensor_names.layer_name(config, 2, tensor_names.ROUTER)
    damage(tmp_path / "target", lambda tensors: tensors[router][3].add_(0.1))
    assert "diverge in layer 2 of the target, which differs from layer 2 of the source by " in refusal(tmp_path, COPY)


def test_experts_with_equal_scores_may_change_places(tmp_path: Path) -> None:
    """Which of two experts with one score a token chooses is decided by rounding, and no fault of a growth."""
    config = more_experts(tmp_path)
    routers = [tensor_names.layer_name(config, layer, tensor_names.ROUTER) for layer in range(config.num_hidden_layers)]

    def level(tensors: Tensors) -> None:
        """The copies of experts 0 and 1 get one score, but for rounding: that differs in source and target."""
        copies = len(tensors[routers[0]]) // SPARSE["num_experts"]
        for router in routers:
            tensors[router][copies : 2 * copies] = tensors[router][:copies] * (1 + (copies - 1.5) * 1e-6)

    damage(tmp_path / "source", level)
    damage(tmp_path / "target", level)
    certificate = judge(tmp_path, COPY)
    assert certificate["ties"] is True
    assert certificate["max_abs_dlogit"] > 1e-3
    assert max(certificate["layers"]) < 1e-5


@pytest.mark.parametrize("place", [(slice(None), 17), (99, slice(None))], ids=["channel", "token"])
def test_a_layer_that_is_wrong_for_one_channel_or_for_one_token_is_as_wrong_as_without_it(place: Any) -> None:
    before_nd, after_nd = torch.randn(2, 200, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alignment = align(SOURCE, SOURCE.model_copy(update=WIDER), FPI, SEED, torch.float64)
    target_nd, everything_n = alignment.to_target(after_nd), torch.ones(200, dtype=torch.bool)
    assert alignment.difference(before_nd, after_nd, target_nd, everything_n) < 1e-12
    target_nd[place] = alignment.to_target(before_nd)[place]
    assert alignment.difference(before_nd, after_nd, target_nd, everything_n) == pytest.approx(1, abs=0.2)


def test_a_shard_that_is_cut_short_is_refused_by_its_name(grown: Path) -> None:
    config = read_config(grown / "target")
    with reading.Reader(grown / "target") as reader:
        tensors = {name: reader.get(name).clone() for name in tensor_names.tensor_shapes(config)}
    reading.write(
        grown / "target",
        tensor_names.tensor_shapes(config),
        torch.float32,
        iter(tensors.items()),
        max_shard_bytes=60_000,
    )
    shards = sorted((grown / "target").glob("model-*.safetensors"))
    assert len(shards) > 2
    assert judge(grown, FPI)["passed"] is True
    with shards[1].open("r+b") as file:
        file.truncate(shards[1].stat().st_size - 8)
    with pytest.raises(UserError, match=shards[1].name):
        judge(grown, FPI)


KINDS: dict[str, dict[str, Any]] = {
    "exact": {},
    "exact, sampled maps": {"maps": "sampled"},
    "copied": {"norm": "copy", "_sizes": {"hidden_size": 64, "num_attention_heads": 8}},
    "padded": {"norm": "zero_pad"},
    "lemon": {"method": "lemon", "norm": "zero_pad"},
    "hypercloning": {
        "method": "hypercloning",
        "_sizes": {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 8},
    },
    "stacked": {"depth": "stack"},
    "larger heads": {"_sizes": {"head_dim": 16}},
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_every_kind_of_exact_growth_are_where_they_are_looked_for(
    tmp_path: Path, kind: str, tied: bool
) -> None:
    options = dict(KINDS[kind])
    sizes = {**WIDER, **options.pop("_sizes", {})}
    how = FPI.model_copy(update=options)
    source = SOURCE.model_copy(update={"tie_word_embeddings": tied})
    write_source(tmp_path / "source", source, torch.float64)
    scale_up(tmp_path / "source", tmp_path / "target", changed(source, how, **sizes), how, SEED)
    certificate = judge(tmp_path, how, default_tolerance("F64"))
    assert max(certificate["layers"]) < 1e-12
    assert certificate["max_abs_dlogit"] < 1e-12
