"""The network: parity with transformers through files, the mixture of experts against a plain loop, arithmetic."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from aquilamoe.checkpoint import tensor_names
from aquilamoe.checkpoint.state_dict import load_model, save_model
from aquilamoe.config.network import ABSENT_SHARED_EXPERT_SIZE, ModelConfig
from aquilamoe.model.transformer import Attention, Decoder, MixtureOfExperts
from judge import open_with_transformers, randomize

transformers.utils.logging.disable_progress_bar()

Network = Callable[..., ModelConfig]


def random_decoder(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Decoder:
    model = Decoder(config).to(dtype)
    randomize(model)
    return model


def random_tokens(config: ModelConfig, length: int = 24) -> Tensor:
    return torch.randint(config.vocab_size, (2, length), generator=torch.Generator().manual_seed(1))


def transformers_model(config: ModelConfig) -> transformers.PreTrainedModel:
    """The same model made by transformers alone, from its own config classes."""
    renamed = {"rope_theta", "num_experts", "qk_norm", "shared_expert_intermediate_size", "moe_intermediate_size"}
    values = config.model_dump(exclude=renamed)
    values["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_theta}
    values.setdefault("sliding_window", None)  # which Mistral's class would make 4096
    name = tensor_names.architecture(config)
    if name == "MixtralForCausalLM":
        values["num_local_experts"] = config.num_experts
    elif config.is_moe:
        values |= {"num_experts": config.num_experts, "moe_intermediate_size": config.moe_intermediate_size}
        values["shared_expert_intermediate_size"] = config.shared_expert_intermediate_size or ABSENT_SHARED_EXPERT_SIZE
        values["mlp_only_layers"] = list(config.mlp_only_layers)
    model_class = getattr(transformers, name)
    known = model_class.config_class().to_dict().keys() | {"head_dim", "num_experts"}
    model = model_class(model_class.config_class(**{key: value for key, value in values.items() if key in known}))
    randomize(model)
    return model


def worst(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference, after checking that there is something to compare."""
    assert expected.std() > 0.1
    return (actual - expected).abs().max().item()


SHAPES = [
    {},
    {"tie_word_embeddings": True},
    {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 6},
    {"num_attention_heads": 4, "num_key_value_heads": 1, "hidden_size": 32, "head_dim": 8},
]


@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_transformers_computes_our_logits_from_the_files_we_write(
    kind: str, changes: dict[str, object], network: Network, tmp_path: Path
) -> None:
    config = network(kind, **changes)
    model = random_decoder(config)
    save_model(model, tmp_path)
    theirs = open_with_transformers(tmp_path)
    assert type(theirs).__name__ == tensor_names.architecture(config)
    tokens = random_tokens(config)
    with torch.no_grad():
        assert worst(model(tokens)[0], theirs(tokens).logits) < 1e-5


@pytest.mark.parametrize("tied", [False, True])
def test_we_compute_the_logits_of_transformers_from_the_files_it_writes(
    kind: str, tied: bool, tmp_path: Path, network: Network
) -> None:
    config = network(kind, tie_word_embeddings=tied)
    theirs = transformers_model(config)
    theirs.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert model.config == config
    tokens = random_tokens(config)
    with torch.no_grad():
        assert worst(model(tokens)[0], theirs(tokens).logits) < 1e-5


@pytest.mark.filterwarnings(
    "ignore:Initializing zero-element tensors"
)  # torch, about transformers' empty shared expert
def test_a_qwen2_moe_with_an_empty_shared_expert_is_read_as_it_is(tmp_path: Path, network: Network) -> None:
    config = network("qwen2_moe")
    theirs_config: Any = transformers_model(config).config
    theirs_config.shared_expert_intermediate_size = 0
    theirs = transformers.Qwen2MoeForCausalLM(theirs_config)
    theirs.save_pretrained(tmp_path)
    tokens = random_tokens(config)
    with torch.no_grad():
        assert worst(load_model(tmp_path)(tokens)[0], theirs(tokens).logits) < 1e-5


def test_heads_that_do_not_divide_the_hidden_size_open_in_transformers(tmp_path: Path, network: Network) -> None:
    config = network("llama", num_attention_heads=10)
    model = random_decoder(config)
    save_model(model, tmp_path)
    tokens = random_tokens(config)
    with torch.no_grad():
        assert worst(model(tokens)[0], open_with_transformers(tmp_path)(tokens).logits) < 1e-5


def gradients_of(model: torch.nn.Module) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def next_token_loss(logits_btv: Tensor, tokens_bt: Tensor) -> Tensor:
    return F.cross_entropy(logits_btv[:, :-1].flatten(0, 1), tokens_bt[:, 1:].flatten())


def test_gradients_of_the_loss_equal_those_of_transformers(kind: str, tmp_path: Path, network: Network) -> None:
    config = network(kind)
    model = random_decoder(config)
    save_model(model, tmp_path)
    theirs = open_with_transformers(tmp_path, experts_implementation="eager" if config.is_moe else None)
    tokens = random_tokens(config)
    next_token_loss(model(tokens)[0], tokens).backward()
    next_token_loss(theirs(tokens).logits, tokens).backward()
    mine, other = gradients_of(model), gradients_of(theirs)
    if not config.shared_expert_intermediate_size:
        other = {name: gradient for name, gradient in other.items() if ".shared_expert" not in name}
    if config.is_moe:
        for layer in filter(config.is_sparse, range(config.num_hidden_layers)):
            prefix = f"model.layers.{layer}.mlp.experts"
            gate, up = mine.pop(f"{prefix}.gate_proj"), mine.pop(f"{prefix}.up_proj")
            mine[f"{prefix}.gate_up_proj"] = torch.cat([gate, up], dim=1)
    assert mine.keys() == other.keys()
    for name, gradient in other.items():
        assert gradient.abs().max() > 1e-4, name
        assert (mine[name] - gradient).abs().max() < 1e-5 * gradient.abs().max() + 1e-6, name


def naive_mixture(moe: MixtureOfExperts, x_nd: Tensor) -> Tensor:
    """Token by token, expert by expert, with the softmax over the chosen written out."""
    out = []
    for x_d in x_nd:
        scores_e = moe.gate.weight @ x_d
        chosen = sorted(range(len(scores_e)), key=lambda index: -scores_e[index].item())[: moe.num_experts_per_tok]
        total = sum(scores_e[index].exp() for index in chosen)
        mixed = torch.zeros_like(x_d)
        for index in chosen:
            gate, up = moe.experts.gate_proj[index] @ x_d, moe.experts.up_proj[index] @ x_d
            inner = gate / (1 + (-gate).exp()) * up
            mixed = mixed + scores_e[index].exp() / total * (moe.experts.down_proj[index] @ inner)
        out.append(mixed)
    return torch.stack(out)


@pytest.mark.parametrize(
    ("num_experts", "top_k", "tokens"), [(4, 2, 150), (2, 1, 20), (8, 3, 31), (4, 4, 10), (4, 2, 1)]
)
def test_experts_equal_a_loop_over_tokens_forward_and_backward(
    num_experts: int, top_k: int, tokens: int, network: Network
) -> None:
    config = network("mixtral", num_experts=num_experts, num_experts_per_tok=top_k)
    moe = MixtureOfExperts(config).double()
    randomize(moe)
    x_nd = torch.randn(tokens, config.hidden_size, dtype=torch.float64)
    outputs, gradients = [], []
    for forward in (lambda x: moe(x[None])[0][0], lambda x: naive_mixture(moe, x)):
        x = x_nd.clone().requires_grad_()
        out = forward(x)
        loss = (out * torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)).sum()
        outputs.append(out)
        gradients.append(torch.autograd.grad(loss, [x, *moe.parameters()]))
    assert worst(*outputs) < 1e-10
    for mine, expected in zip(*gradients, strict=True):
        assert expected.abs().max() > 0.01 or top_k == 1
        assert (mine - expected).abs().max() < 1e-10


def test_an_expert_without_tokens_gets_a_zero_gradient_and_disturbs_no_other(network: Network) -> None:
    config = network("mixtral")
    moe = MixtureOfExperts(config).double()
    randomize(moe)
    x_nd = torch.randn(40, config.hidden_size, dtype=torch.float64)
    x_nd[:, 0] = 1.0
    with torch.no_grad():
        moe.gate.weight[2] = 0.0
        moe.gate.weight[2, 0] = -100.0
    mixed, routing = moe(x_nd[None])
    assert not (routing.experts_nk == 2).any()
    assert worst(mixed[0], naive_mixture(moe, x_nd)) < 1e-10
    mixed.square().sum().backward()
    for parameter in moe.experts.parameters():
        assert parameter.grad is not None
        assert not parameter.grad[2].any()
        assert all(parameter.grad[other].any() for other in (0, 1, 3))


def test_no_token_is_dropped_when_all_choose_the_same_experts(network: Network) -> None:
    config = network("mixtral")
    moe = MixtureOfExperts(config).double()
    randomize(moe)
    x_nd = torch.randn(67, config.hidden_size, dtype=torch.float64)
    x_nd[:, 0] = 1.0
    with torch.no_grad():
        moe.gate.weight[:, 0] = torch.tensor([100.0, 99.0, 0.0, 0.0], dtype=torch.float64)
        moe.gate.weight[:, 1:] *= 0.01
    mixed, routing = moe(x_nd[None])
    assert routing.experts_nk.unique().tolist() == [0, 1]
    assert worst(mixed[0], naive_mixture(moe, x_nd)) < 1e-10


def test_the_router_decides_in_float32_under_bfloat16_autocast(network: Network) -> None:
    config = network("mixtral")
    moe = MixtureOfExperts(config)
    randomize(moe)
    x_nd = torch.randn(20, config.hidden_size)
    with torch.autocast("cpu", torch.bfloat16):
        _, routing = moe(x_nd[None])
    assert routing.logits_ne.dtype == torch.float32
    assert torch.equal(routing.logits_ne, F.linear(x_nd, moe.gate.weight))
    assert torch.equal(routing.experts_nk, routing.logits_ne.topk(2).indices)


def test_a_token_does_not_change_the_logits_before_it(kind: str, network: Network) -> None:
    config = network(kind)
    model = random_decoder(config, torch.float64)
    tokens = random_tokens(config)
    changed = tokens.clone()
    changed[:, 15] = (changed[:, 15] + 1) % config.vocab_size
    with torch.no_grad():
        before, after = model(tokens)[0], model(changed)[0]
    assert (before[:, :15] - after[:, :15]).abs().max() < 1e-12
    assert (before[:, 15:] - after[:, 15:]).abs().amax(dim=(0, 2)).min() > 1e-6


def test_every_moe_layer_reports_its_routing_and_no_dense_one_does(kind: str, network: Network) -> None:
    config = network(kind)
    _, routings = random_decoder(config)(random_tokens(config))
    assert len(routings) == config.num_sparse_layers
    for routing in routings:
        assert routing.logits_ne.shape == (2 * 24, 4)
        assert routing.experts_nk.shape == (2 * 24, 2)


def test_initial_values_follow_the_seed_alone(network: Network) -> None:
    config = network("qwen2_moe", hidden_size=64)
    models = [Decoder(config) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        model.initialize(seed)
    first, same, other = (dict(model.named_parameters()) for model in models)
    for name, parameter in first.items():
        assert torch.equal(parameter, same[name])
        if name.endswith("norm.weight"):
            assert (parameter == 1).all()
        elif name.endswith(".bias"):
            assert (parameter == 0).all()
        else:
            assert not torch.equal(parameter, other[name])
            assert parameter.std().item() == pytest.approx(config.initializer_range, rel=0.15), name


def paper(layers: int, hidden: int, ffn: int, heads: int, num_experts: int = 0) -> ModelConfig:
    """A model of the paper (METHODS section 1): QKV bias, untied, vocabulary 151851, 8 key-value heads of 128."""
    return ModelConfig(
        vocab_size=151851,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=4096,
        rope_theta=1e6,
        rms_norm_eps=1e-5,
        initializer_range=0.02,
        qkv_bias=True,
        tie_word_embeddings=False,
        num_experts=num_experts,
        moe_intermediate_size=ffn if num_experts else 0,
        num_experts_per_tok=2 if num_experts else 0,
    )


def test_parameters_of_the_paper_s_models_to_the_printed_digits() -> None:
    assert f"{paper(32, 4096, 14336, 32).num_params / 1e9:.3f}" == "8.224"
    assert f"{paper(40, 5120, 20480, 40).num_params / 1e9:.3f}" == "16.655"
    mixture = paper(40, 5120, 20480, 40, num_experts=8)
    assert f"{mixture.num_params / 1e9:.2f}" == "104.74"
    assert f"{mixture.num_active_params / 1e9:.2f}" == "29.24"


@pytest.mark.parametrize("tied", [False, True])
def test_num_params_counts_the_parameters_of_the_network(kind: str, tied: bool, network: Network) -> None:
    config = network(kind, tie_word_embeddings=tied)
    model = Decoder(config)
    assert config.num_params == sum(parameter.numel() for parameter in model.parameters())
    if config.is_moe:
        experts = [layer.mlp.experts for layer in model.model.layers if isinstance(layer.mlp, MixtureOfExperts)]
        idle = sum(tensor.numel() for stack in experts for tensor in stack.parameters()) // 2
        assert config.num_active_params == config.num_params - idle
    else:
        assert config.num_active_params == config.num_params


def test_flops_per_token_equal_a_hand_calculation(network: Network) -> None:
    sizes = {"vocab_size": 10, "hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 3, "head_dim": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1}
    dense = network("llama", **sizes, **heads)
    # q and o 4x8, k and v 4x2, gate, up and down 4x6, in three layers; the head 10x4; 4 heads of 2 over 16 positions.
    assert dense.flops_per_token(16) == 6 * (3 * (2 * 32 + 2 * 8 + 3 * 24) + 40 + 3 * 4 * 2 * 16)
    assert network("llama", **sizes, **heads, tie_word_embeddings=True).flops_per_token(16) == dense.flops_per_token(16)
    # Two of the four experts, and the router's 4x4.
    mixture = network("mixtral", **sizes, **heads)
    assert mixture.flops_per_token(16) == dense.flops_per_token(16) + 6 * 3 * (3 * 24 + 16)


def test_gradients_below_the_experts_are_the_same_bits_every_time_on_two_threads(network: Network) -> None:
    """A token whose row goes to three experts gets three gradients: their sum must not depend on who is first."""
    config = network("mixtral", num_experts=8, num_experts_per_tok=3, hidden_size=128)
    model = random_decoder(config)
    tokens_bt = random_tokens(config, 1024).view(32, 64)
    torch.set_num_threads(2)
    attention, gradients = model.model.layers[0].self_attn, []
    assert isinstance(attention, Attention)
    for _ in range(6):
        model.zero_grad(set_to_none=True)
        model(tokens_bt)[0].logsumexp(dim=-1).mean().backward()
        gradients.append(gradients_of(attention.o_proj)["weight"])
    assert all(torch.equal(gradients[0], other) for other in gradients[1:])
