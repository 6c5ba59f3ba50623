"""What experts cost over a dense layer of the same FLOPs, and a Mixture of Experts over a dense model of its size.

python benchmarks/experts.py                     about a minute on two cores
python benchmarks/experts.py --device cuda

Forward and backward in bf16 autocast. All ways take turns on the same tokens; medians count, and ratios to the dense
one are printed. On a CPU seconds are those of one thread of this process, which other processes hardly change.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from aquilamoe.checkpoint.allocator import keep_large_buffers
from aquilamoe.config.network import ModelConfig
from aquilamoe.model.kernels.choice import ExpertsKernel, Kernels
from aquilamoe.model.transformer import Decoder, FeedForward, MixtureOfExperts
from aquilamoe.training.objective import balance_loss, z_loss

KERNELS: tuple[ExpertsKernel, ...] = ("loop", "grouped")
TOKENS, LENGTH, LAYERS = 4096, 128, 6
ROUTER_SPREAD = 0.02  # standard deviation of the router's weights, as a model begins


@dataclass(frozen=True)
class Shape:
    """A layer: hidden size, neurons of an expert, experts, and how many a token goes through."""

    hidden: int
    size: int
    experts: int
    top_k: int
    tokens: int = TOKENS

    def config(self, sparse: bool) -> ModelConfig:
        """A model of such layers, or the dense model of its active size."""
        return ModelConfig(
            vocab_size=4096,
            hidden_size=self.hidden,
            intermediate_size=self.size * self.top_k,
            num_hidden_layers=LAYERS,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=self.hidden // 8,
            max_position_embeddings=1024,
            rope_theta=1e4,
            rms_norm_eps=1e-5,
            initializer_range=0.02,
            qkv_bias=False,
            tie_word_embeddings=False,
            num_experts=self.experts if sparse else 0,
            num_experts_per_tok=self.top_k if sparse else 0,
            moe_intermediate_size=self.size if sparse else 0,
        )


SHAPES = {
    "cpu": [Shape(128, 352, 8, 2), Shape(256, 704, 8, 2), Shape(512, 1408, 8, 2), Shape(128, 88, 64, 8)],
    "cuda": [Shape(2048, 5632, 8, 2, 16384), Shape(2048, 1408, 64, 8, 16384)],
}
WHOLE = {
    "cpu": [Shape(128, 352, 8, 2), Shape(256, 704, 8, 2), Shape(128, 88, 64, 8)],
    "cuda": [Shape(1024, 2816, 8, 2, 16384)],
}


class OneByOne(MixtureOfExperts):
    """As it is often written: for each expert its tokens are looked up, gathered, computed and added."""

    def _mix(self, x_nd: Tensor, experts_nk: Tensor, gates_nk: Tensor, _counts_e: Tensor) -> Tensor:
        out_nd = torch.zeros_like(x_nd)
        for expert in range(len(self.experts.gate_proj)):
            tokens_r, slots_r = (experts_nk == expert).nonzero(as_tuple=True)
            rows_rd, weights = x_nd[tokens_r], self.experts
            inner_rf = nn.functional.silu(rows_rd @ weights.gate_proj[expert].t()) * (
                rows_rd @ weights.up_proj[expert].t()
            )
            mixed_rd = (inner_rf @ weights.down_proj[expert].t()) * gates_nk[tokens_r, slots_r, None]
            out_nd = out_nd.index_add(0, tokens_r, mixed_rd.to(out_nd.dtype))
        return out_nd


def medians(ways: dict[str, Callable[[], object]], device: str, rounds: int) -> dict[str, float]:
    """Seconds of each way; they take turns."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(-3, rounds):
        for name, way in ways.items():
            started = _now(device)
            way()
            if turn >= 0:
                found[name].append(_now(device) - started)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def _now(device: str) -> float:
    if device == "cpu":
        return time.thread_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def layers(shape: Shape, device: str) -> dict[str, nn.Module]:
    config = shape.config(sparse=True)
    ways: dict[str, nn.Module] = {"dense": FeedForward(shape.hidden, shape.size * shape.top_k)}
    for kernel in KERNELS:
        ways[kernel] = moe = MixtureOfExperts(config)
        moe.experts.kernels = Kernels(experts=kernel)
    ways["one by one"] = OneByOne(config)
    for layer in ways.values():
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=ROUTER_SPREAD)
    return {name: layer.to(device) for name, layer in ways.items()}


def layer_costs(shape: Shape, device: str, rounds: int) -> dict[str, float]:
    """Seconds of a layer's forward and backward pass, each time on other tokens, whose experts have other rows."""
    x_btd = torch.randn(shape.tokens // LENGTH, LENGTH, shape.hidden, device=device)
    gradient_btd = torch.randn_like(x_btd)

    def run(layer: nn.Module) -> None:
        x = torch.randn_like(x_btd).requires_grad_()
        with torch.autocast(device, torch.bfloat16):
            out = layer(x)
        out = out[0] if isinstance(out, tuple) else out
        out.backward(gradient_btd.to(out.dtype))
        layer.zero_grad()

    return medians({name: _call(run, layer) for name, layer in layers(shape, device).items()}, device, rounds)


def _call(run: Callable[[nn.Module], None], layer: nn.Module) -> Callable[[], object]:
    return lambda: run(layer)


def model_costs(shape: Shape, device: str, rounds: int) -> dict[str, float]:
    """Seconds of whole training steps: embeddings, attention, head, router losses, clipping and AdamW as well."""
    models = {name: Decoder(shape.config(name == "sparse")) for name in ("dense", "sparse")}
    for model in models.values():
        model.initialize(0)
    ways = {name: _trainer(model.to(device), shape.tokens, device) for name, model in models.items()}
    return medians(ways, device, rounds)


def _trainer(model: Decoder, tokens: int, device: str) -> Callable[[], object]:
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step() -> None:
        rows_bt = torch.randint(model.config.vocab_size, (tokens // LENGTH, LENGTH + 1), device=device)
        with torch.autocast(device, torch.bfloat16):
            loss, routings = model(rows_bt[:, :-1], rows_bt[:, 1:])
        for routing in routings:
            loss = loss + 0.01 * balance_loss(routing, routing.counts_e) + 0.001 * z_loss(routing)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad()

    return step


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=SHAPES, default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args(arguments)
    keep_large_buffers()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    names = (*KERNELS, "one by one")
    print("A layer, forward and backward: times the seconds of a dense layer of the same FLOPs")
    print(f"{'hidden x neurons':>18} {'experts':>8} {'tokens':>7} {'dense ms':>9}", *(f"{n:>11}" for n in names))
    for shape in SHAPES[options.device]:
        found = layer_costs(shape, options.device, options.rounds)
        ratios = (f"{found[name] / found['dense']:11.2f}" for name in names)
        size, experts = f"{shape.hidden} x {shape.size}", f"{shape.experts}/{shape.top_k}"
        print(f"{size:>18} {experts:>8} {shape.tokens:>7} {found['dense'] * 1e3:9.1f}", *ratios)
    print(f"\nA training step of {LAYERS} layers: tokens/s per active FLOP, dense = 1")
    for shape in WHOLE[options.device]:
        found = model_costs(shape, options.device, options.rounds)
        flops = [shape.config(sparse).flops_per_token(LENGTH) for sparse in (True, False)]
        share = flops[0] / flops[1] * found["dense"] / found["sparse"]
        size, experts = f"{shape.hidden} x {shape.size}", f"{shape.experts}/{shape.top_k}"
        print(f"{size:>18} {experts:>8} {shape.tokens:>7} {found['dense'] * 1e3:9.1f} {share:11.2f}")


if __name__ == "__main__":
    main()
