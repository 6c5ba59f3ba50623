"""Scale-Out on files: experts that equal the dense model, experts with noise, and what is refused."""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import Tensor

import small_checkpoints
from aquilamoe.checkpoint import reader as reading
from aquilamoe.checkpoint import tensor_names
from aquilamoe.checkpoint.hf_config import read_config, read_eos_token_id
from aquilamoe.checkpoint.reader import Reader
from aquilamoe.config.messages import UserError
from aquilamoe.config.network import ABSENT_SHARED_EXPERT_SIZE
from aquilamoe.config.schema import ModelConfig, UpcyclingConfig
from aquilamoe.growth import rules
from aquilamoe.growth.scale_out import scale_out
from effort import examples
from small_checkpoints import logits, upcycle, upcycling, write_source

ROOT = Path(__file__).resolve().parents[2]
METHODS = ("copy", "drop", "noise", "permute")


COPY = upcycling()
# Of Mixtures of Experts, by what transformers calls them: what is not Mixtral's.
FAMILIES: dict[str, dict[str, Any]] = {
    "Mixtral": {"qkv_bias": False},
    "Qwen2Moe": {"qkv_bias": True},
    "Qwen2Moe with a shared expert": {"qkv_bias": True, "shared_expert_intermediate_size": 10},
    "Qwen2Moe with a dense layer": {"qkv_bias": True, "mlp_only_layers": (0,), "moe_intermediate_size": 6},
    "Qwen3Moe": {"qkv_bias": False, "qk_norm": "head"},
    "Qwen3Moe with a dense layer": {"qkv_bias": False, "qk_norm": "head", "mlp_only_layers": (1,)},
    "Olmoe": {"qkv_bias": False, "qk_norm": "projection"},
}


def model(**changes: Any) -> ModelConfig:
    return small_checkpoints.model(**{"hidden_size": 16, "num_attention_heads": 4} | changes)


def experts(number: int = 4, chosen: int = 2, **changes: Any) -> ModelConfig:
    return model(num_experts=number, num_experts_per_tok=chosen, **changes)


def difference(source: Path, target: Path) -> float:
    """The largest, of logits that are not small themselves."""
    assert logits(source).abs().max() > 0.5
    return small_checkpoints.difference(source, target)


def transformers_logits(directory: Path) -> Tensor:
    # Its quick way to compute experts wants sizes that fill whole registers.
    return small_checkpoints.transformers_logits(directory, experts_implementation="eager")


def tensors(directory: Path) -> dict[str, Tensor]:
    with Reader(directory) as reader:
        return {name: reader.get(name).clone() for name in reader.names}


@st.composite
def upcyclings(draw: st.DrawFn) -> tuple[ModelConfig, ModelConfig, UpcyclingConfig]:
    """Small dense models with what can be made of them, by every method and with every option."""
    number, one_of = st.integers, st.sampled_from
    groups, slots, hidden = draw(number(1, 2)), draw(number(1, 2)), draw(number(2, 16))
    shards, layers, qk_norm = draw(one_of([1, 1, 2, 3])), draw(number(1, 3)), draw(one_of(["none", "none", "head"]))
    sizes = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": groups * slots,
        "num_key_value_heads": groups,
        "qk_norm": qk_norm,
        "qkv_bias": qk_norm == "none" and draw(st.booleans()),
        "tie_word_embeddings": draw(st.booleans()),
    }
    neurons, copies = draw(number(1, 5)), draw(number(1 if shards > 1 else 2, 5))
    source = model(intermediate_size=shards * neurons, **sizes)
    chosen = draw(number(1, copies))
    has_shared = qk_norm == "none" and shards * neurons != ABSENT_SHARED_EXPERT_SIZE and draw(st.booleans())
    options = {
        "moe_intermediate_size": neurons,
        "mlp_only_layers": tuple(sorted(draw(st.sets(number(0, layers - 1), max_size=layers - 1)))),
        "shared_expert_intermediate_size": shards * neurons if has_shared else 0,
        # Probabilities of all experts sum to 1, however they are made.
        "norm_topk_prob": draw(one_of([True, True, False])),
    }
    target = experts(shards * copies, shards * chosen, intermediate_size=shards * neurons, **sizes, **options)
    method, init = draw(one_of(METHODS)), draw(one_of(["normal", "variance", "orthogonal", "zero"]))
    std = draw(one_of([0.02, 0.141, 2.0, 0.0]))
    if shards > 1 and target.num_experts > target.num_experts_per_tok and 0.0 in (std, {"zero": 0.0}.get(init, 1.0)):
        init, std = "normal", 0.02
    amounts = {"noise": 0.1 * (method == "noise"), "drop_ratio": 0.5 * (method == "drop")}
    return source, target, upcycling(method=method, router_init=init, router_std=std, **amounts)


@given(upcyclings())
@settings(derandomize=True, deadline=None, max_examples=examples(200))
def test_an_upcycling_keeps_the_function_exactly_when_it_claims_to(
    case: tuple[ModelConfig, ModelConfig, UpcyclingConfig],
) -> None:
    source, target, how = case
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write_source(directory / "source", source)
        measured = difference(directory / "source", upcycle(directory, target, how))
    if rules.preserves(how, source, target):
        assert measured < 1e-10
    else:
        assert measured > 1e-6


@given(upcyclings())
@settings(derandomize=True, deadline=None, max_examples=25)
def test_transformers_finds_the_claims_of_random_upcyclings_true_in_float32(
    case: tuple[ModelConfig, ModelConfig, UpcyclingConfig],
) -> None:
    source, target, how = case
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write_source(directory / "source", source, torch.float32)
        upcycle(directory, target, how)
        before, after = (transformers_logits(directory / name) for name in ("source", "target"))
    measured = ((before - after).abs().max() / before.abs().max()).item()
    assert measured < 1e-5 if rules.preserves(how, source, target) else measured > 1e-4


@pytest.mark.parametrize("qkv_bias", [False, True], ids=["Mixtral", "Qwen2-MoE"])
@pytest.mark.parametrize(
    ("method", "sizes"),
    [
        ("copy", {}),
        ("permute", {}),
        ("permute", {"number": 12, "chosen": 6, "moe_intermediate_size": 4}),
    ],
    ids=["copy", "permute", "fine-grained"],
)
def test_transformers_agrees_that_dense_and_upcycled_checkpoint_are_one_function(
    method: str, sizes: dict[str, int], qkv_bias: bool, tmp_path: Path
) -> None:
    write_source(tmp_path / "source", model(qkv_bias=qkv_bias), torch.float32)
    target = experts(qkv_bias=qkv_bias, **sizes)
    assert rules.preserves(upcycling(method=method), model(), target)
    upcycle(tmp_path, target, upcycling(method=method))
    before, after = (transformers_logits(tmp_path / name) for name in ("source", "target"))
    assert before.abs().max() > 0.5
    torch.testing.assert_close(after, before, atol=1e-5, rtol=0)


def neurons_of(weights: dict[str, Tensor], config: ModelConfig, layer: int, expert: int | None) -> Tensor:
    """Of a feed-forward, a row for every neuron: its weights in gate, up and down."""
    roles = [
        role if expert is None else tensor_names.expert_role(expert, role)
        for role in (tensor_names.GATE, tensor_names.UP, tensor_names.DOWN)
    ]
    gate, up, down = (weights[tensor_names.layer_name(config, layer, role)] for role in roles)
    return torch.cat([gate, up, down.T], dim=1)


def test_drop_draws_one_set_of_neurons_afresh_with_their_mean_and_deviation(tmp_path: Path) -> None:
    source, target = model(hidden_size=64, intermediate_size=80), experts(hidden_size=64, intermediate_size=80)
    write_source(tmp_path / "source", source)
    before = tensors(tmp_path / "source")
    before["model.layers.1.mlp.up_proj.weight"] += 0.5
    shapes = tensor_names.tensor_shapes(source)
    reading.write(tmp_path / "source", shapes, torch.float64, ((name, before[name]) for name in shapes))
    upcycle(tmp_path, target, upcycling(method="drop", drop_ratio=0.3))
    after, dropped = tensors(tmp_path / "target"), []
    dense = neurons_of(before, source, 1, None)
    for expert in range(4):
        grown = neurons_of(after, target, 1, expert)
        is_new = (grown != dense).any(dim=1)
        assert (grown != dense)[is_new].all()  # gate, up and down of a neuron together
        assert is_new.sum() == 24
        for part in range(3):
            old, new = (rows[is_new][:, 64 * part : 64 * (part + 1)] for rows in (dense, grown))
            assert new.mean().item() == pytest.approx(old.mean().item(), abs=0.02)
            assert new.std().item() == pytest.approx(old.std().item(), rel=0.1)
        dropped.append(is_new)
    assert not any(torch.equal(dropped[i], dropped[j]) for i in range(4) for j in range(i))


def test_permuted_experts_have_the_same_neurons_each_in_an_order_of_its_own(tmp_path: Path) -> None:
    write_source(tmp_path / "source", model())
    upcycle(tmp_path, experts(), upcycling(method="permute"))
    before, after = tensors(tmp_path / "source"), tensors(tmp_path / "target")
    orders = []
    for expert in range(4):
        grown, dense = neurons_of(after, experts(), 0, expert), neurons_of(before, model(), 0, None)
        orders.append((grown[:, None] == dense).all(-1).int().argmax(1).tolist())
        assert torch.equal(grown, dense[orders[-1]])
        assert sorted(orders[-1]) == list(range(12))
    assert len({tuple(order) for order in orders}) == 4


def test_fine_grained_experts_are_parts_that_share_the_scores_of_the_whole(tmp_path: Path) -> None:
    source, target = model(), experts(6, 4, intermediate_size=4)
    write_source(tmp_path / "source", source)
    with pytest.raises(UserError, match=r"num_experts_per_tok: 4 experts, .* into 3 parts, .* use a multiple of 3"):
        upcycle(tmp_path, target)
    target = experts(6, 3, intermediate_size=4)
    upcycle(tmp_path, target)
    before, after = tensors(tmp_path / "source"), tensors(tmp_path / "target")
    dense = neurons_of(before, source, 1, None)
    for copy in range(2):
        parts = [neurons_of(after, target, 1, 3 * copy + part) for part in range(3)]
        scale = torch.tensor([1.0, 3**0.5, 3**0.5], dtype=torch.float64).repeat_interleave(16)
        torch.testing.assert_close(torch.cat(parts), dense * scale, atol=0, rtol=1e-12)
    router = after[tensor_names.layer_name(target, 1, tensor_names.ROUTER)]
    assert torch.equal(router[0::3], router[1::3])
    assert torch.equal(router[0::3], router[2::3])
    assert router[0].ne(router[3]).all()


@pytest.mark.parametrize(
    ("init", "std", "number", "expected"),
    [
        ("normal", 0.05, 8, 0.05),
        ("variance", 0.02, 8, 0.02**0.5),
        ("orthogonal", 0.05, 8, 0.05),
        ("orthogonal", 0.05, 48, 0.05),
        ("zero", 0.02, 8, 0.0),
    ],
)
def test_routers_start_as_configured(init: str, std: float, number: int, expected: float, tmp_path: Path) -> None:
    source, target = model(hidden_size=32), experts(number, hidden_size=32)
    write_source(tmp_path / "source", source)
    upcycle(tmp_path, target, upcycling(router_init=init, router_std=std))
    router = tensors(tmp_path / "target")[tensor_names.layer_name(target, 0, tensor_names.ROUTER)]
    assert router.square().mean().sqrt().item() == pytest.approx(expected, rel=0.15)
    if init == "orthogonal":
        short = router if number <= 32 else router.T
        products = short @ short.T
        torch.testing.assert_close(products, products[0, 0] * torch.eye(len(products), dtype=torch.float64))


@pytest.mark.parametrize("noise", [0.01, 0.1])
def test_noise_makes_every_expert_different_by_that_fraction(noise: float, tmp_path: Path) -> None:
    source, target = model(hidden_size=48, intermediate_size=64), experts(hidden_size=48, intermediate_size=64)
    how = upcycling(method="noise", noise=noise)
    write_source(tmp_path / "source", source)
    upcycle(tmp_path, target, how)
    before, after = tensors(tmp_path / "source"), tensors(tmp_path / "target")
    for role in (tensor_names.GATE, tensor_names.UP, tensor_names.DOWN):
        dense = before[tensor_names.layer_name(source, 1, role)]
        grown = [
            after[tensor_names.layer_name(target, 1, tensor_names.expert_role(expert, role))] for expert in range(4)
        ]
        for expert in grown:
            assert (expert - dense).std() / dense.std() == pytest.approx(noise, rel=0.1)
        assert all(grown[i].ne(grown[j]).any() for i in range(4) for j in range(i))
    assert not rules.preserves(how, source, target)
    assert difference(tmp_path / "source", tmp_path / "target") > 1e-4


def test_routers_are_drawn_and_everything_but_the_feed_forward_is_copied(tmp_path: Path) -> None:
    source, target = model(hidden_size=64), experts(8, hidden_size=64)
    write_source(tmp_path / "source", source)
    how = upcycling(method="noise", noise=0.5, router_std=0.141)
    upcycle(tmp_path, target, how)
    before, after = tensors(tmp_path / "source"), tensors(tmp_path / "target")
    assert set(after) == set(tensor_names.tensor_shapes(target))
    routers = [after[tensor_names.layer_name(target, layer, tensor_names.ROUTER)] for layer in range(2)]
    assert torch.stack(routers).std().item() == pytest.approx(0.141, rel=0.1)
    assert routers[0].ne(routers[1]).all()
    kept = set(before) & set(after)
    assert {name for name in before if name not in kept} == {
        tensor_names.layer_name(source, layer, role)
        for layer in range(2)
        for role in (tensor_names.GATE, tensor_names.UP, tensor_names.DOWN)
    }
    for name in kept:
        assert torch.equal(before[name], after[name])


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_weights(tmp_path: Path) -> None:
    write_source(tmp_path / "source", model())
    how = upcycling(method="noise", noise=0.1)
    directories = [upcycle(tmp_path, experts(), how, seed, name) for seed, name in ((1, "a"), (1, "b"), (2, "c"))]
    first, second, other = ((directory / "model.safetensors").read_bytes() for directory in directories)
    assert first == second
    assert first != other


def test_upcycling_keeps_the_dtype_the_bytes_and_the_files_beside_the_weights(tmp_path: Path) -> None:
    source, target = model(), experts(max_position_embeddings=64)
    write_source(tmp_path / "source", source, torch.bfloat16)
    (tmp_path / "source/tokenizer.json").write_text("{}")
    upcycle(tmp_path, target)
    before, after = tensors(tmp_path / "source"), tensors(tmp_path / "target")
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    for expert in range(4):
        name = tensor_names.layer_name(target, 0, tensor_names.expert_role(expert, tensor_names.DOWN))
        assert torch.equal(after[name], before[tensor_names.layer_name(source, 0, tensor_names.DOWN)])
    assert (tmp_path / "target/tokenizer.json").read_text() == "{}"
    assert read_config(tmp_path / "target") == target
    assert read_eos_token_id(tmp_path / "target") == 3


WITHOUT_TORCH = """
import sys
from pathlib import Path
from aquilamoe.config.schema import ModelConfig, UpcyclingConfig
from aquilamoe.growth.scale_out import scale_out
target, how = ModelConfig.model_validate_json(sys.argv[1]), UpcyclingConfig.model_validate_json(sys.argv[2])
scale_out(Path("source"), Path("alone"), target, how, 0)
assert "torch" not in sys.modules, "torch was imported"
"""


def test_plain_copies_with_a_router_need_no_torch_and_are_the_same_bytes(tmp_path: Path) -> None:
    target, how = experts(mlp_only_layers=(0,)), upcycling(router_init="orthogonal")
    write_source(tmp_path / "source", model(), torch.bfloat16)
    upcycle(tmp_path, target, how)
    words = [sys.executable, "-c", WITHOUT_TORCH, target.model_dump_json(), how.model_dump_json()]
    subprocess.run(words, cwd=tmp_path, check=True)
    alone, beside = (tmp_path / name / reading.SINGLE_FILE for name in ("alone", "target"))
    assert alone.read_bytes() == beside.read_bytes()


def test_progress_counts_every_tensor_once(tmp_path: Path) -> None:
    write_source(tmp_path / "source", model())
    seen: list[tuple[int, int]] = []
    scale_out(
        tmp_path / "source", tmp_path / "target", experts(), COPY, 0, progress=lambda done, of: seen.append((done, of))
    )
    total = len(tensor_names.tensor_shapes(experts()))
    assert seen == [(done, total) for done in range(total + 1)]


def test_every_upcycling_has_a_yaml_with_all_of_its_settings() -> None:
    files = {path.stem: path for path in (ROOT / "conf/upcycling").glob("*.yaml")}
    assert set(files) == {*METHODS, "split", "mix"}
    of_all = [field for field in UpcyclingConfig.model_fields if field not in UpcyclingConfig.added]
    own: set[str] = set()
    for name, path in files.items():
        how = UpcyclingConfig.model_validate(OmegaConf.to_container(OmegaConf.load(path)))
        assert how.method == name
        lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
        assert all(" # " in line for line in lines)
        keys = [line.partition(":")[0] for line in lines]
        assert [key for key in keys if key in of_all] == of_all
        assert len(keys) == len(of_all) or name in ("split", "mix")
        own |= set(keys) - set(of_all)
    assert own == set(UpcyclingConfig.added)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (model(), "num_experts: target 0; .* set num_experts to at least 2"),
        (experts(hidden_size=32), "hidden_size: target 32, source 16; .* change them in a scale_up stage before it"),
        (experts(intermediate_size=5), "intermediate_size: target 5, source 12; .* use 12 or a divisor of it"),
        (experts(intermediate_size=24), "intermediate_size: target 24, source 12; .* use 12 or a divisor of it"),
        (experts(5, 2, intermediate_size=6), "num_experts: 5 experts, .* into 2 parts, .* use a multiple of 2"),
        (experts(num_hidden_layers=3), "num_hidden_layers: target 3, source 2; "),
        (experts(num_attention_heads=8), "num_attention_heads: target 8, source 4; "),
        (experts(num_key_value_heads=4), "num_key_value_heads: target 4, source 2; "),
        (experts(head_dim=8), "head_dim: target 8, source 4; a scale-out cannot change it, keep the source's"),
        (experts(vocab_size=33), "vocab_size: target 33, source 32; "),
        (experts(qkv_bias=False), "qkv_bias: target False, source True; "),
        (experts(max_position_embeddings=8), "max_position_embeddings: target 8 is smaller than the source's 32; "),
    ],
)
def test_an_upcycling_that_cannot_be_done_is_refused_before_anything_is_written(
    target: ModelConfig, message: str, tmp_path: Path
) -> None:
    write_source(tmp_path / "source", model())
    with pytest.raises(UserError, match=message) as error:
        upcycle(tmp_path, target)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "target").exists()


@given(
    number=st.integers(2, 4),
    chosen=st.integers(1, 3),
    copies=st.integers(1, 3),
    more=st.integers(0, 6),
    family=st.sampled_from(sorted(FAMILIES)),
    normed=st.booleans(),
)
@settings(derandomize=True, deadline=None, max_examples=examples(50))
def test_more_experts_keep_the_function_exactly_when_tokens_choose_all_copies(
    number: int, chosen: int, copies: int, more: int, family: str, normed: bool
) -> None:
    chosen = min(number, chosen)
    options = {"norm_topk_prob": normed, **FAMILIES[family]}
    source = experts(number, chosen, **options)
    target = experts(copies * number, min(chosen + more, copies * number), **options)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write_source(directory / "source", source)
        for how in (COPY, upcycling(method="permute"), upcycling(method="drop", drop_ratio=0.5)):
            measured = difference(directory / "source", upcycle(directory, target, how))
            assert measured < 1e-10 if rules.preserves(how, source, target) else measured > 1e-6


@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_agrees_that_experts_and_their_copies_are_one_function(
    family: str, norm_topk_prob: bool, tmp_path: Path
) -> None:
    options = {"norm_topk_prob": norm_topk_prob, **FAMILIES[family]}
    source = experts(**options)
    if norm_topk_prob:
        assert tensor_names.architecture(source) == family.partition(" ")[0] + "ForCausalLM"
    write_source(tmp_path / "source", source, torch.float32)
    upcycle(tmp_path, experts(12, 6, **options), upcycling(method="permute"))
    before, after = (transformers_logits(tmp_path / name) for name in ("source", "target"))
    torch.testing.assert_close(after, before, atol=1e-5, rtol=0)


def test_copies_of_an_expert_are_neighbours_with_its_score(tmp_path: Path) -> None:
    source, target = experts(), experts(8, 4)
    write_source(tmp_path / "source", source)
    upcycle(tmp_path, target)
    before, after = tensors(tmp_path / "source"), tensors(tmp_path / "target")
    for expert in range(8):
        assert torch.equal(neurons_of(after, target, 1, expert), neurons_of(before, source, 1, expert // 2))
    router = before[tensor_names.layer_name(source, 1, tensor_names.ROUTER)]
    assert torch.equal(
        after[tensor_names.layer_name(target, 1, tensor_names.ROUTER)], router.repeat_interleave(2, dim=0)
    )
    upcycle(tmp_path, target, upcycling(method="noise", noise=0.1), name="noisy")
    noisy = tensors(tmp_path / "noisy")
    assert neurons_of(noisy, target, 1, 0).ne(neurons_of(noisy, target, 1, 1)).all()


def test_a_shared_expert_is_the_dense_feed_forward_and_the_others_write_half(tmp_path: Path) -> None:
    source, target = model(), experts(shared_expert_intermediate_size=12, mlp_only_layers=(0,))
    write_source(tmp_path / "source", source)
    upcycle(tmp_path, target)
    before, after = tensors(tmp_path / "source"), tensors(tmp_path / "target")
    for shared, dense in (
        (tensor_names.SHARED_GATE, tensor_names.GATE),
        (tensor_names.SHARED_UP, tensor_names.UP),
        (tensor_names.SHARED_DOWN, tensor_names.DOWN),
    ):
        assert torch.equal(
            after[tensor_names.layer_name(target, 1, shared)],
            before[tensor_names.layer_name(source, 1, dense)],
        )
    assert not after[tensor_names.layer_name(target, 1, tensor_names.SHARED_ROUTER)].any()
    halves = neurons_of(before, source, 1, None) * torch.tensor([1.0, 1.0, 0.5]).double().repeat_interleave(16)
    for expert in range(4):
        assert torch.equal(neurons_of(after, target, 1, expert), halves)
    kept = [name for name in before if ".layers.0." in name]
    assert all(torch.equal(before[name], after[name]) for name in kept)
    assert not any(".layers.0.mlp.experts" in name for name in after)
