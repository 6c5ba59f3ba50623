"""A checkpoint that computes without being loaded: every tensor is read when it is needed, and released after.

The modules are those of `aquilamoe.model.transformer`, on the meta device; only where their weights come from is
different, and that `growth.folding` folds into them what other families have. In memory are the hidden states of all
tokens, and of the weights an attention, a feed-forward, an expert, or a slice of the head.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from aquilamoe.checkpoint import tensor_names
from aquilamoe.checkpoint.dtypes import torch_dtype
from aquilamoe.checkpoint.hf_config import read_checkpoint_config
from aquilamoe.checkpoint.reader import Reader
from aquilamoe.checkpoint.safetensors_header import FIXED, main_dtype
from aquilamoe.checkpoint.state_dict import check
from aquilamoe.config.schema import ModelConfig
from aquilamoe.growth import folding
from aquilamoe.growth.bounds import LOOKUPS, TOKENS_AT_ONCE
from aquilamoe.model.kernels.choice import Kernels
from aquilamoe.model.transformer import Block, FeedForward, RMSNorm, Routing

Tensors = dict[str, Tensor]


class Weights(Protocol):
    """Where a decoder takes its tensors from, by on-disk names; what it gets is its own, in the computation's dtype."""

    dtype: torch.dtype

    def get(self, name: str) -> Tensor:
        """A tensor."""

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows that are neighbours."""

    def look_up(self, name: str, numbers_n: Tensor) -> Tensor:
        """Rows by their numbers."""

    def origin(self, name: str) -> str:
        """Tensors of one origin are equal, to the last bit; of most it is the name of the tensor itself."""


class Stored:
    """The tensors of a checkpoint's files.

    dtype: of the computation.
    file_dtype: of most of what is in the files.
    read: names of the tensors that were used, but for an embedding, of which few rows are looked up.
    """

    def __init__(self, reader: Reader, dtype: torch.dtype) -> None:
        self.reader = reader
        self.dtype = dtype
        self.file_dtype = torch_dtype(main_dtype(reader.tensors))
        self.read: set[str] = set()

    @property
    def is_rounded(self) -> bool:
        """Whether files have a tensor of fewer bits than are computed with."""
        bits = torch.finfo(self.dtype).bits
        return any(torch.finfo(torch_dtype(dtype)).bits < bits for dtype in _dtypes(self.reader))

    def get(self, name: str) -> Tensor:
        """A tensor."""
        return self._take(name, self.reader.get(name))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows that are neighbours."""
        return self._take(name, self.reader.rows(name, start, stop))

    def look_up(self, name: str, numbers_n: Tensor) -> Tensor:
        """Rows by their numbers."""
        return self._take(name, self.reader.get(name)[numbers_n])

    def origin(self, name: str) -> str:
        """Not known to be equal to another."""
        return name

    def _take(self, name: str, mapped: Tensor) -> Tensor:
        if name != tensor_names.EMBEDDING:  # of which few rows are looked up
            self.read.add(name)
        tensor = mapped.to(self.dtype, copy=True)
        self.reader.release(name)
        return tensor


class Opened(NamedTuple):
    """A checkpoint that is ready to compute."""

    weights: Stored
    config: ModelConfig


class StreamedDecoder:
    """The network of a checkpoint, a step at a time: `embed`, `run_layer` for each layer, `normalize`, `head_rows`.

    weights: the tensors of `config`, in the dtype of the computation.
    """

    def __init__(self, weights: Weights, config: ModelConfig) -> None:
        self.config = config
        self.weights = weights
        self.dtype = weights.dtype

    def embed(self, tokens_bt: Tensor) -> Tensor:
        """The residual stream that enters the first layer (b, t, d); only the rows of these tokens are read."""
        out_btd = torch.empty(*tokens_bt.shape, self.config.hidden_size, dtype=self.dtype)
        for tokens_n, out_nd in _together(LOOKUPS, tokens_bt.flatten(), out_btd.flatten(0, 1)):
            out_nd.copy_(self.weights.look_up(tensor_names.EMBEDDING, tokens_n))
        particulars = self.config.particulars
        return out_btd if particulars is None else out_btd.mul_(particulars.embedding_multiplier)

    def run_layer(
        self, layer: int, x_btd: Tensor, watch: Callable[[Tensor], None] | None = None
    ) -> tuple[Tensor, Routing | None]:
        """The residual stream behind a layer, of the stream before it; and what its router decided.

        watch: called with what the feed-forward, or the router, reads (n, d).
        """
        roles = tensor_names.role_shapes(self.config, layer)
        with torch.device("meta"):
            block = Block(self.config, layer)
        # The other one keeps the softmax, and is of a kind that imports torch's compiler when it is first called.
        block.self_attn.kernels = Kernels(attention="sdpa")
        for name in ("input_layernorm", "post_attention_layernorm") if self.config.has_layer_norm else ():
            block.set_submodule(name, nn.LayerNorm(self.config.hidden_size, self.config.rms_norm_eps, device="meta"))
        read = partial(self._read, layer)
        block.set_submodule("self_attn", _Streamed(block.self_attn, partial(read, "self_attn."), flat=False))
        resident = [role for role in roles if not role.startswith(("self_attn.", "mlp."))]
        if self.config.is_sparse(layer):
            block.mlp.set_submodule("experts", _StreamedExperts(self.config, read, partial(self._origins, layer)))
            resident.append(tensor_names.ROUTER)
            if self.config.shared_expert_intermediate_size:
                shared = block.get_submodule("mlp.shared_expert")
                block.mlp.set_submodule(
                    "shared_expert", _Streamed(shared, partial(read, "mlp.shared_expert."), flat=True)
                )
                resident.append(tensor_names.SHARED_ROUTER)
        else:
            block.set_submodule("mlp", _Streamed(block.mlp, partial(read, "mlp."), flat=True))
        if watch is not None:
            block.mlp.register_forward_pre_hook(lambda _, inputs: watch(inputs[0].flatten(0, -2)))
        table = folding.table(self.config, layer, x_btd.shape[1], self.dtype)
        weights = {role: self._get(layer, role) for role in resident}
        return functional_call(block, weights, (x_btd, *table))

    def normalize(self, x_btd: Tensor) -> Tensor:
        """What the head reads (n, d), of the stream behind the last layer."""
        if self.config.has_layer_norm:
            weight_d, bias_d = (
                self.weights.get(name) for name in (tensor_names.FINAL_NORM, tensor_names.FINAL_NORM_BIAS)
            )
            return F.layer_norm(x_btd.flatten(0, 1), weight_d.shape, weight_d, bias_d, self.config.rms_norm_eps)
        with torch.device("meta"):
            norm = RMSNorm(self.config.hidden_size, self.config.rms_norm_eps)
        weight_d = self.weights.get(tensor_names.FINAL_NORM)
        if self.config.particulars is not None:
            weight_d /= self.config.particulars.logits_scaling
        return functional_call(norm, {"weight": weight_d}, (x_btd.flatten(0, 1),))

    def head_rows(self, start: int, stop: int) -> Tensor:
        """Rows of the head (stop - start, d): what makes the logits of these tokens of the vocabulary."""
        head = tensor_names.EMBEDDING if self.config.tie_word_embeddings else tensor_names.HEAD
        return self.weights.rows(head, start, stop)

    def _origins(self, layer: int, expert: int) -> tuple[str, ...]:
        """Of the tensors of an expert: experts of the same origins are one function."""
        on_disk = tensor_names.layer_names(self.config, layer)
        prefix = f"mlp.experts.{expert}."
        return tuple(self.weights.origin(on_disk[role]) for role in on_disk if role.startswith(prefix))

    def _read(self, layer: int, prefix: str) -> Tensors:
        """The tensors of a part of a layer, by their names inside it."""
        roles = tensor_names.role_shapes(self.config, layer)
        return {role.removeprefix(prefix): self._get(layer, role) for role in roles if role.startswith(prefix)}

    def _get(self, layer: int, role: str) -> Tensor:
        """A tensor of a layer, as the modules of a network without particulars take it."""
        return folding.fold(self.config, role, self.weights.get(tensor_names.layer_name(self.config, layer, role)))


class _Streamed(nn.Module):
    """A part of a block that has weights only while it runs, on some rows of its input at a time.

    flat: whether the rows of the input (b, t, d) are tokens; otherwise they are whole sequences.
    """

    def __init__(self, part: nn.Module, read: Callable[[], Tensors], *, flat: bool) -> None:
        super().__init__()
        self.part = part
        self._read = read
        self._flat = flat

    def forward(self, x: Tensor, *arguments: Tensor) -> Tensor:
        weights = self._read()
        rows = x.flatten(0, -2) if self._flat else x
        out = torch.empty_like(rows)
        for rows_in, rows_out in _together(TOKENS_AT_ONCE // rows[0, ..., 0].numel(), rows, out):
            rows_out.copy_(functional_call(self.part, weights, (rows_in, *arguments), strict=True))
        return out.view_as(x)


class _StreamedExperts(nn.Module):
    """In the place of `model.Experts`: each expert is read for its rows, and not read when it has none.

    Neighbours that are known to be equal are read once, and compute the rows of all of them.
    """

    def __init__(
        self, config: ModelConfig, read: Callable[[str], Tensors], origins: Callable[[int], tuple[str, ...]]
    ) -> None:
        super().__init__()
        self._read = read
        self._origins = origins
        with torch.device("meta"):
            self._expert = FeedForward(config.hidden_size, config.moe_intermediate_size)

    def forward(self, rows_sd: Tensor, counts_e: Tensor) -> Tensor:
        outputs_sd = torch.empty_like(rows_sd)
        counts = counts_e.tolist()
        chosen = [expert for expert, count in enumerate(counts) if count]
        done = 0
        for _, equal in groupby(chosen, self._origins):
            experts = list(equal)
            part = slice(done, done + sum(counts[expert] for expert in experts))
            weights = self._read(f"mlp.experts.{experts[0]}.")
            for rows_in, rows_out in _together(TOKENS_AT_ONCE, rows_sd[part], outputs_sd[part]):
                rows_out.copy_(functional_call(self._expert, weights, (rows_in,), strict=True))
            done = part.stop
        return outputs_sd


def _together(count: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of `count` rows of each tensor at a time."""
    return zip(*(tensor.split(max(1, count)) for tensor in tensors), strict=True)


@contextmanager
def opened(*directories: Path) -> Iterator[tuple[Opened, ...]]:
    """Weights and model of checkpoints, to compute in float32, or in float64 if one of them has it.

    UserError for damaged ones.
    """
    with ExitStack() as files:
        readers = [files.enter_context(Reader(directory)) for directory in directories]
        configs = [read_checkpoint_config(directory) for directory in directories]
        dtype = torch.float32
        for reader, config in zip(readers, configs, strict=True):
            check(config.model, reader)
            for stored in _dtypes(reader):
                dtype = torch.promote_types(dtype, torch_dtype(stored))
        yield tuple(
            Opened(Stored(reader, dtype), config.model) for reader, config in zip(readers, configs, strict=True)
        )


def _dtypes(reader: Reader) -> set[str]:
    """The types of the weights in the files."""
    return {info.dtype for name, info in reader.tensors.items() if not name.endswith(FIXED)}
