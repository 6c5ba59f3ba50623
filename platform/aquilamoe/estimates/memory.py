"""Memory of one device that trains, in bytes by what it is for: for plans, so without torch.

What `training/` allocates, in formulas; tests hold them to what torch's allocator counts. Not in them: what a CUDA
context and its libraries take (about 1 GB), and the holes of an allocator that is nearly full.
"""

from dataclasses import dataclass
from math import prod

from aquilamoe.checkpoint import tensor_names
from aquilamoe.config.network import ModelConfig
from aquilamoe.config.schema import ClusterConfig, PretrainStage
from aquilamoe.estimates.activations import (
    PRECISIONS,
    Pass,
    attention_working_bytes,
    cast_bytes,
    layer_bytes,
    working_bytes,
)
from aquilamoe.model.kernels.choice import Kernels
from aquilamoe.model.kernels.chunks import chunk_rows

FLOAT, ROUNDED = 4, 2
UNEVEN = 1.25  # rows of the busiest device's experts, in equal shares: an assumption, the balance loss works on it


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Each part at its largest, and the most that all take together, which is less where they are not there at once.

    weights: float32 parameters, and a rounded copy where one computes. gradients: of all parameters, float32.
    optimizer: moments. activations: what the forward pass keeps, and works on. loss: the head's gradient beside its
    loss, and a chunk of logits. communication: parameters that are gathered, gradients on their way.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    communication: int
    peak: int


@dataclass(frozen=True)
class Layout:
    """How a model lies on the devices of a stage.

    shards: devices that share one copy of the model. expert_parallel: of these, that have different experts.
    """

    workers: int
    shards: int
    expert_parallel: int

    @classmethod
    def of(cls, cluster: ClusterConfig) -> "Layout":
        shards = 1 if cluster.parallel == "ddp" else cluster.shard_size or cluster.workers
        return cls(cluster.workers, shards, cluster.expert_parallel)


def device_type(cluster: ClusterConfig) -> str:
    return "cuda" if cluster.gpus_per_worker else "cpu"


def micro_batches(stage: PretrainStage, cluster: ClusterConfig) -> tuple[int, int]:
    """Sequences of a forward pass of one worker, and how many of these make a step."""
    rows = max(1, stage.batch_tokens // stage.sequence_length // cluster.workers)
    most = min(rows, max(1, cluster.micro_batch_tokens // stage.sequence_length))
    return most, -(-rows // most)


def estimate(model: ModelConfig, stage: PretrainStage, cluster: ClusterConfig) -> Memory:
    """What a stage takes of each device."""
    return _Device(model, stage, cluster).memory()


def checkpoint_bytes(model: ModelConfig, stage: PretrainStage) -> int:
    """Of a checkpoint: float32 weights, and the optimizer's moments."""
    return FLOAT * model.num_params + _moments(model, stage)


def _moments(model: ModelConfig, stage: PretrainStage) -> int:
    """AdamW keeps two for every parameter, Muon one for hidden matrices; what is none of these is AdamW's."""
    return 2 * FLOAT * model.num_params - (FLOAT * _hidden_matrices(model) if stage.optimizer.name == "muon" else 0)


class _Device:
    """One device, moment by moment of a step: when the loss is computed, when the backward pass begins and ends."""

    def __init__(self, model: ModelConfig, stage: PretrainStage, cluster: ClusterConfig) -> None:
        self.model = model
        self.stage = stage
        self.layout = Layout.of(cluster)
        self.checkpointing = cluster.activation_checkpointing
        self.precision = PRECISIONS[stage.precision]
        rows, self.passes = micro_batches(stage, cluster)
        kernels = Kernels(cluster.attention, cluster.experts)
        self.run = Pass(rows, stage.sequence_length, device_type(cluster), self.precision, kernels)
        self.table = model.vocab_size * model.hidden_size  # of the embedding, and of the head
        self.is_rounded = stage.precision == "bf16_master" and self.layout.shards == 1

    def memory(self) -> Memory:
        own = self.model.num_params // self.layout.shards
        weights = own * (FLOAT + (ROUNDED if self.is_rounded else 0))
        optimizer = _moments(self.model, self.stage) // self.layout.shards
        gradients = FLOAT * own
        # Before the last pass there is the sum of the others; in the first nothing yet.
        summed = gradients if self.passes > 1 else 0
        kept, working, casts = self._activations()
        uneven = self._uneven()
        loss_forward, loss_backward = self._loss()
        gathered, moving, root_gradients = self._sharded()
        buckets = self._buckets()
        head = 0 if summed or self.layout.shards > 1 else FLOAT * self.table
        moments = {
            "last attention": summed + kept - self._after_attention() + casts + gathered,
            "loss": summed + kept + casts + loss_forward + gathered,
            "backward begins": summed + kept + loss_backward + gathered,
            "top layer": summed + head + kept + working + gathered + moving + root_gradients // 2,
            # In bf16 weights gradients are rounded first; the embedding's is whole before it is added.
            "backward ends": gradients + self._arriving() + gathered + root_gradients,
            "update": gradients + self._update(),
        }
        return Memory(
            weights=weights,
            gradients=gradients + self._arriving(),
            optimizer=optimizer,
            activations=kept + max(working, casts) + uneven,
            loss=max(loss_forward, loss_backward),
            communication=buckets + gathered + moving + root_gradients,
            peak=weights + optimizer + buckets + uneven + max(moments.values()),
        )

    def _uneven(self) -> int:
        """Rows of experts that a device gets beyond an equal share, where it has other experts than its neighbours."""
        model = self.model
        if self.layout.expert_parallel == 1:
            return 0
        layers = 1 if self.checkpointing else model.num_sparse_layers
        inner = 2 * model.hidden_size + 4 * model.moe_intermediate_size
        rows = layers * self.run.tokens * model.num_experts_per_tok
        return int((UNEVEN - 1) * rows * self.precision.compute * inner)

    def _update(self) -> int:
        """What an optimizer step works on: AdamW in place, Muon a matrix at a time, in float32 and three of bf16.

        Where new and old parts have rates of their own, parameters that are both are kept until they are updated.
        """
        kept = 0 if self.stage.optimizer.groups.are_one else FLOAT * self.model.num_params // self.layout.shards
        if self.stage.optimizer.name == "adamw":
            return kept
        model = self.model
        neurons = max(model.intermediate_size, model.moe_intermediate_size, model.num_attention_heads * model.head_dim)
        return max(kept, model.hidden_size * neurons * (2 * FLOAT + 3 * ROUNDED))

    def _arriving(self) -> int:
        """Gradients of the last pass that are not added yet, beside those that are."""
        if self.passes == 1 or self.layout.shards > 1:
            return 0
        return ROUNDED * self.model.num_params if self.is_rounded else FLOAT * self.table

    def _activations(self) -> tuple[int, int, int]:
        """What is kept until the backward pass begins, what that adds in one layer, and casts that only autocast keeps.

        With checkpointing a layer keeps its input, and all else only while it is computed again.
        """
        model = self.model
        run = self.run
        layers = kinds(self.model)
        stream = self.precision.stream * model.hidden_size
        # The final norm's input and output, and the rows of tokens.
        outside = run.tokens * (stream + self.precision.compute * model.hidden_size + 2 * FLOAT) + 2 * 8 * run.tokens
        whole = {layer: layer_bytes(model, layer, run) for layer in layers}
        everything = sum(number * whole[layer] for layer, number in layers.items())
        working = max(working_bytes(model, layer, run) for layer in layers)
        if not self.checkpointing:
            return outside + everything, working, 0
        routers = model.num_sparse_layers * run.tokens * (2 * FLOAT * model.num_experts + 8 * model.num_experts_per_tok)
        casts = sum(number * cast_bytes(model, layer, run) for layer, number in layers.items())
        casts = 0 if self.layout.shards > 1 else casts
        return outside + model.num_hidden_layers * run.tokens * stream + routers, working + max(whole.values()), casts

    def _after_attention(self) -> int:
        """What the last layer has not made when its attention is computed, less what that works on."""
        model, neurons = self.model, self.model.intermediate_size
        experts = model.num_experts_per_tok * model.moe_intermediate_size
        inner = experts if model.is_sparse(model.num_hidden_layers - 1) else neurons
        ahead = self.run.tokens * self.precision.compute * (2 * model.hidden_size + 4 * inner)
        return ahead - attention_working_bytes(model, self.run)

    def _loss(self) -> tuple[int, int]:
        """Of the head: while the loss is computed, and when its gradient is handed on.

        The gradient of the head is summed in float32 beside the loss, and once more when it is scaled.
        """
        tokens, compute = self.run.tokens, self.precision.compute
        rows = chunk_rows(tokens, self.model.vocab_size, self.run.device)
        hidden = tokens * compute * self.model.hidden_size
        cast = ROUNDED * self.table if self.precision.casts else 0
        # Logits and their softmax in float32; then their gradient, and its product with the chunk's hidden states.
        chunk = max(2 * FLOAT * rows * self.model.vocab_size, compute * (rows * self.model.vocab_size + self.table))
        scaled = FLOAT * self.table + (ROUNDED * self.table if self.precision.weights == ROUNDED else 0)
        return FLOAT * self.table + cast + hidden + chunk, FLOAT * self.table + scaled + 2 * hidden

    def _sharded(self) -> tuple[int, int, int]:
        """FSDP2's: what is whole during a pass, what moves in the backward pass, whole gradients outside the layers.

        Embedding, head and final norm are one unit, whole from the first layer to the last. Of the layers one is whole
        and the next on its way, in a buffer from which it is copied. Gradients leave in float32 from a buffer, too.
        """
        if self.layout.shards == 1:
            return 0, 0, 0
        model, each = self.model, self.precision.weights
        outside = self.table * (1 if model.tie_word_embeddings else 2)
        layer = self._layer_params()
        return each * outside + 3 * each * layer, (each + FLOAT) * layer, (each + FLOAT) * outside

    def _layer_params(self) -> int:
        """Parameters of the largest layer that one device gathers: of experts those that it has."""
        found = []
        for layer in kinds(self.model):
            params = layer_params(self.model, layer)
            experts = sum(size for role, size in params.items() if role.startswith("mlp.experts."))
            found.append(sum(params.values()) - experts + experts // self.layout.expert_parallel)
        return max(found)

    def _buckets(self) -> int:
        """DDP copies gradients into buckets of its own; a rounded copy's are averaged where they are."""
        alone = self.layout.workers == 1 or self.layout.shards > 1 or self.is_rounded
        return 0 if alone else FLOAT * self.model.num_params


def layer_params(model: ModelConfig, layer: int) -> dict[str, int]:
    """Parameters of a layer by role, those left out that only a file has."""
    shapes = tensor_names.role_shapes(model, layer)
    return {role: prod(shape) for role, shape in shapes.items() if role not in tensor_names.filler_roles(model)}


def kinds(model: ModelConfig) -> dict[int, int]:
    """One layer of each kind, dense and sparse, with a window and without, and how many there are of it."""
    found: dict[tuple[bool, int | None], list[int]] = {}
    for layer in range(model.num_hidden_layers):
        found.setdefault((model.is_sparse(layer), model.window(layer)), []).append(layer)
    return {layers[0]: len(layers) for layers in found.values()}


def _hidden_matrices(model: ModelConfig) -> int:
    """Parameters that Muon moves: matrices inside the layers but for routers."""
    return sum(
        number * prod(shape)
        for layer, number in kinds(model).items()
        for role, shape in tensor_names.role_shapes(model, layer).items()
        if len(shape) > 1
        and role not in (*tensor_names.filler_roles(model), tensor_names.ROUTER, tensor_names.SHARED_ROUTER)
    )
