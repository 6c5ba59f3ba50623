"""What benchmarks/training.py measures: one training step of this project and of others, on the same shapes and tokens.

Runs in a process of its own for each library (litgpt: in a virtual environment of its own, without aquilamoe), which
reads requests from its standard input, a line of JSON each, and replies with one each. A step is what a training loop
does: forward with the mean next-token loss (and a balance loss where there are experts), backward, clip, update.
"""

import gc
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

BALANCE, Z = 0.001, 0.001
ALLOCATOR = Path(__file__).resolve().parents[1] / "platform/aquilamoe/checkpoint/allocator.py"
# Where the time of a step goes: the beginnings of the names of the profiler's events, whose inner ones count for them.
REGIONS = {
    "attention": ("aquilamoe::explicit_attention", "aten::scaled_dot_product", "aten::_scaled_dot_product"),
    "head and loss": ("_HeadCrossEntropy",),
    "norms": ("_RMSNorm", "aten::rms_norm"),
    "optimizer": ("Optimizer.step",),
    "experts": ("aquilamoe::loop_product", "aten::_grouped_mm"),
    "products of the layers": ("aten::mm", "aten::addmm", "aten::bmm"),
    "casts and copies": ("aten::copy_", "aten::cat", "aten::fill_", "aten::zero_"),
}
OTHER = "the rest: rotation, SwiGLU, residuals, clipping, dispatch"
Loss = Callable[[Tensor, Tensor], Tensor]  # of tokens and the tokens that follow them, both (b, t)


@dataclass
class Mode:
    """How a library is used, from its name: words after the library's, separated by blanks."""

    words: list[str]

    def has(self, word: str) -> bool:
        return word in self.words

    @property
    def autocast(self) -> bool:
        return self.has("autocast")

    @property
    def bf16(self) -> bool:
        return self.has("bf16")


def keep_large_buffers() -> None:
    """The allocator's setting of this project, for all: loaded as a file, because peers lack the package."""
    spec = importlib.util.spec_from_file_location("allocator", ALLOCATOR)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.keep_large_buffers()


def ours(shape: dict[str, Any], mode: Mode, device: str) -> tuple[nn.Module, Loss]:
    """This project's network, as `precision` bf16, bf16_master or fp32 trains it."""
    from aquilamoe.config.network import ModelConfig
    from aquilamoe.model.transformer import Decoder
    from aquilamoe.training.objective import balance_loss, z_loss

    config = ModelConfig.model_validate(
        shape | {"rope_theta": 1e4, "rms_norm_eps": 1e-5, "initializer_range": 0.02, "qkv_bias": False}
    )
    model = Decoder(config)
    model.initialize(0)
    model = model.to(device, torch.bfloat16 if mode.bf16 else torch.float32)
    if mode.has("compiled"):
        for layer in model.model.layers:
            layer.compile()

    def loss_of(tokens_bt: Tensor, targets_bt: Tensor) -> Tensor:
        loss, routings = model(tokens_bt, targets_bt)
        if routings:
            balance = torch.stack([balance_loss(each, each.counts_e) for each in routings]).mean()
            loss = loss + BALANCE * balance + Z * torch.stack([z_loss(each) for each in routings]).mean()
        return loss

    return model, loss_of


def transformers(shape: dict[str, Any], mode: Mode, device: str) -> tuple[nn.Module, Loss]:
    """Llama, or Mixtral with its own balance loss; compiled layer by layer, as ours is."""
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    experts = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
    values = {key: value for key, value in shape.items() if key not in experts}
    values |= {
        "use_cache": False,
        "rms_norm_eps": 1e-5,
        "attn_implementation": "eager" if mode.has("eager") else "sdpa",
    }
    torch.manual_seed(0)
    if shape["num_experts"]:
        sparse = {"num_local_experts": shape["num_experts"], "num_experts_per_tok": shape["num_experts_per_tok"]}
        sparse |= {"output_router_logits": True, "router_aux_loss_coef": BALANCE}
        model: Any = MixtralForCausalLM(MixtralConfig(**values, **sparse))
        if mode.has("grouped"):
            model.set_experts_implementation("grouped_mm")
        elif mode.has("loop"):
            model.set_experts_implementation("eager")
    else:
        model = LlamaForCausalLM(LlamaConfig(**values))
    model = model.to(device, torch.bfloat16 if mode.bf16 else torch.float32).train()
    if mode.has("compiled"):
        for layer in model.model.layers:
            layer.compile()
    # Labels that are shifted already, so that as many tokens are predicted as ours.
    return model, lambda tokens_bt, targets_bt: model(tokens_bt, labels=targets_bt, shift_labels=targets_bt).loss


def litgpt(shape: dict[str, Any], mode: Mode, device: str) -> tuple[nn.Module, Loss]:
    """litgpt's GPT with Llama's or Mixtral's classes, its own chunked cross-entropy, and no balance loss."""
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy

    config = Config(
        name="benchmark",
        block_size=shape["max_position_embeddings"],
        vocab_size=shape["vocab_size"],
        padded_vocab_size=shape["vocab_size"],
        n_layer=shape["num_hidden_layers"],
        n_head=shape["num_attention_heads"],
        n_query_groups=shape["num_key_value_heads"],
        n_embd=shape["hidden_size"],
        head_size=shape["head_dim"],
        intermediate_size=shape["moe_intermediate_size"] or shape["intermediate_size"],
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMoE" if shape["num_experts"] else "LLaMAMLP",
        n_expert=shape["num_experts"],
        n_expert_per_token=shape["num_experts_per_tok"],
    )
    torch.manual_seed(0)
    model = GPT(config).to(device, torch.bfloat16 if mode.bf16 else torch.float32)
    if mode.has("compiled"):
        for layer in model.transformer.h:
            layer.compile()
    return model, lambda tokens_bt, targets_bt: chunked_cross_entropy(model(tokens_bt), targets_bt)


LIBRARIES = {"ours": ours, "transformers": transformers, "litgpt": litgpt}


class Contestant:
    """A network in training, with the optimizer that every contestant gets: fused AdamW."""

    def __init__(self, name: str, shape: dict[str, Any], rows: int, length: int, device: str) -> None:
        library, *words = name.split()
        mode = Mode(words)
        self.device, self.mode = torch.device(device), mode
        self.model, self.loss_of = LIBRARIES[library](shape, mode, device)
        self.master = _Master(self.model) if mode.has("master") else None
        parameters = self.master.originals if self.master else list(self.model.parameters())
        self.parameters = parameters
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
        generator = torch.Generator().manual_seed(0)
        rows_bt = torch.randint(shape["vocab_size"], (rows, length + 1), generator=generator).to(device)
        self.tokens_bt, self.targets_bt = rows_bt[:, :-1].contiguous(), rows_bt[:, 1:].contiguous()

    def steps(self, count: int) -> dict[str, float]:
        """Make so many steps; what one took, and the last loss."""
        cpu, start = time.process_time(), time.perf_counter()
        for _ in range(count):
            loss = self._step()
        value = loss.item()  # waits for the device
        return {
            "seconds": (time.perf_counter() - start) / count,
            "cpu": (time.process_time() - cpu) / count,
            "loss": value,
        }

    def profile(self) -> dict[str, float]:
        """Share of each region in the time of a step."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            self.steps(3)
        found = dict.fromkeys((*REGIONS, OTHER), 0.0)
        for event in profiler.events():
            found[_region(event)] += event.self_cpu_time_total
        total = sum(found.values())
        return {region: spent / total for region, spent in found.items()}

    def _step(self) -> Tensor:
        autocast: AbstractContextManager[Any] = nullcontext()
        if self.mode.autocast:
            autocast = torch.autocast(self.device.type, torch.bfloat16)
        with autocast:
            loss = self.loss_of(self.tokens_bt, self.targets_bt)
        loss.backward()
        if self.master:
            self.master.take_gradients()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.master:
            self.master.round()
        return loss.detach()


def _region(event: Any) -> str:
    """The outermost region that an event is inside."""
    region = OTHER
    while event is not None:
        for name, beginnings in REGIONS.items():
            if event.name.startswith(beginnings):
                region = name
        event = event.cpu_parent
    return region


class _Master:
    """float32 originals of bf16 parameters, as `precision: bf16_master` keeps them."""

    def __init__(self, model: nn.Module) -> None:
        self.copies = list(model.parameters())
        self.originals = [nn.Parameter(copy.detach().float()) for copy in self.copies]

    @torch.no_grad()
    def take_gradients(self) -> None:
        for original, copy in zip(self.originals, self.copies, strict=True):
            original.grad, copy.grad = None if copy.grad is None else copy.grad.float(), None

    @torch.no_grad()
    def round(self) -> None:
        torch._foreach_copy_([*self.copies], [*self.originals])


def product_peak(device: str, dtype: torch.dtype, sizes: tuple[int, ...], clock: Callable[[], float]) -> float:
    """FLOP/s of the fastest square matrix product."""
    best, work = 0.0, 4e9
    for size in sizes:
        count = max(1, int(work / size**3))
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        for _ in range(8):
            start = clock()
            for _ in range(count):
                product = a @ b
            product[0, 0].item()
            best = max(best, 2 * size**3 * count / (clock() - start))
    return best


def memory_bytes(device: str) -> int:
    """Most device memory so far; 0 on a CPU, whose libraries' contestants share one process."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else 0


class Server:
    """Serves the requests of benchmarks/training.py."""

    def __init__(self, device: str, threads: int) -> None:
        self.device = device
        self.contestants: dict[str, Contestant] = {}
        torch.set_num_threads(threads)
        keep_large_buffers()

    def make(self, name: str, shape: dict[str, Any], rows: int, length: int) -> dict[str, float]:
        """A contestant, warm: compiled, with its kernels chosen and its buffers there."""
        start = time.perf_counter()
        self.contestants[name] = Contestant(name, shape, rows, length, self.device)
        self.contestants[name].steps(2)
        return {"warm_up_s": time.perf_counter() - start} | self.contestants[name].steps(1)

    def steps(self, name: str, count: int) -> dict[str, float]:
        return self.contestants[name].steps(count) | {"memory": memory_bytes(self.device)}

    def profile(self, name: str) -> dict[str, float]:
        return self.contestants[name].profile()

    def clear(self) -> dict[str, float]:
        self.contestants.clear()
        torch.compiler.reset()
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
        return {}

    def peak(self, dtype: str, sizes: list[int], clock: str) -> dict[str, float]:
        read = time.process_time if clock == "cpu" else time.perf_counter
        return {"flops_per_s": product_peak(self.device, getattr(torch, dtype), tuple(sizes), read)}

    def about(self) -> dict[str, Any]:
        """has_bf16: whether products in bfloat16 are computed by instructions for it, and not 20 times as slowly."""
        on_cuda = self.device == "cuda"
        return {
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if on_cuda else f"{torch.get_num_threads()} threads",
            "has_bf16": on_cuda or torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        }


def main() -> None:
    server = Server(sys.argv[1], int(sys.argv[2]))
    out, sys.stdout = os.fdopen(os.dup(1), "w"), sys.stderr  # libraries print, and that would be taken for responses
    for line in sys.stdin:
        request = json.loads(line)
        try:
            response = getattr(server, request.pop("do"))(**request)
        except Exception as error:  # a mode that a library does not have is an entry in the table
            response = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
        print(json.dumps(response), file=out, flush=True)


if __name__ == "__main__":
    main()
