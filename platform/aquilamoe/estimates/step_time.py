"""Time of one optimizer step of a layout, predicted: computing by kind of product, and exchanges by collective.

Computing is what a device executes, recomputation and counting of experts included, at a share of its peak. Exchanges
are bytes over stated bandwidths. Of those of parameters and gradients, which FSDP and DDP start ahead of time, a share
of `OVERLAP` runs beside computing, as far as computing lasts; exchanges of experts' rows wait.
"""

from dataclasses import dataclass
from math import inf

from aquilamoe.config.network import ModelConfig
from aquilamoe.config.schema import ClusterConfig, PretrainStage
from aquilamoe.estimates.activations import PRECISIONS
from aquilamoe.estimates.memory import FLOAT, Layout, kinds, layer_params, micro_batches

OVERLAP = 0.8  # of gathering, scattering and summing of what layers have: an assumption
# How much less of the peak a kind of product reaches than large dense ones: softmax between its products; uneven rows.
RELATIVE = {"products": 1.0, "attention": 0.6, "experts": 0.85}


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Of one device. All in seconds of a step; `exposed` is what of `exchange` no computing hides.

    flops: executed by a device, by kind. traffic: bytes that a device takes in, by collective. model_flops: without
    those of what is computed twice.
    """

    compute: float
    exchange: float
    exposed: float
    flops: dict[str, float]
    traffic: dict[str, float]
    model_flops: float
    peak: float

    @property
    def seconds(self) -> float:
        return self.compute + self.exposed

    @property
    def mfu(self) -> float:
        """Model FLOPs, as a share of the peak."""
        return self.model_flops / (self.peak * self.seconds)


def predict(model: ModelConfig, stage: PretrainStage, cluster: ClusterConfig) -> StepTime | None:
    """Of a stage in the layout of its cluster; None where the peak of a device or its share is not stated."""
    peak, share = cluster.device_flops_per_s, cluster.kernel_efficiency
    if peak is None or share is None:
        return None
    links = Links.of(cluster)
    if links is None:
        return None
    devices = cluster.workers * max(1, cluster.gpus_per_worker)
    flops = _flops(model, stage, cluster, stage.batch_tokens / devices)
    compute = sum(amount / (peak * share * RELATIVE[kind]) for kind, amount in flops.items())
    ahead = _of_parameters(model, stage, cluster, links)
    waiting = _of_rows(model, stage, cluster, links)
    ahead_s, waiting_s = (sum(each.seconds for each in found.values()) for found in (ahead, waiting))
    exposed = waiting_s + (1 - OVERLAP) * ahead_s + max(0.0, OVERLAP * ahead_s - compute)
    traffic = {name: each.size for name, each in {**ahead, **waiting}.items() if each.size}
    model_flops = model.flops_per_token(stage.sequence_length) * stage.batch_tokens / devices
    return StepTime(
        compute=compute,
        exchange=ahead_s + waiting_s,
        exposed=exposed,
        flops=flops,
        traffic=traffic,
        model_flops=model_flops,
        peak=peak,
    )


def counts_first(model: ModelConfig, stage: PretrainStage, passes: int) -> bool:
    """Whether a step counts what goes to which expert, by a forward pass of its own (`RouterObjective`)."""
    router = stage.router
    return model.is_moe and passes > 1 and router.balance_scope == "global_batch" and router.balance_loss_coeff > 0


def _flops(model: ModelConfig, stage: PretrainStage, cluster: ClusterConfig, tokens: float) -> dict[str, float]:
    """What a device executes in a step, by kind of product."""
    head = 6 * model.vocab_size * model.hidden_size
    of_a_layer = 6 * 3 * model.num_experts_per_tok * model.moe_intermediate_size * model.hidden_size
    experts = model.num_sparse_layers * of_a_layer
    whole = model.flops_per_token(stage.sequence_length)
    attention = whole - model.flops_per_token(0)
    layers = {"products": whole - head - experts - attention, "attention": attention, "experts": experts}
    again = int(cluster.activation_checkpointing) + int(counts_first(model, stage, micro_batches(stage, cluster)[1]))
    executed = {kind: tokens * amount * (1 + again / 3) for kind, amount in layers.items()}
    return {**executed, "products": executed["products"] + tokens * head}


@dataclass(frozen=True)
class Links:
    """Bytes a second that a device takes in, from its own machine and from others, and workers of a machine."""

    intra: float
    inter: float
    per_node: int

    @classmethod
    def of(cls, cluster: ClusterConfig) -> "Links | None":
        """None where a bandwidth is not stated that the workers need."""
        per_node = min(cluster.workers, cluster.workers_per_node or cluster.workers)
        intra, inter = cluster.intra_node_bandwidth, cluster.inter_node_bandwidth
        if (per_node > 1 and intra is None) or (per_node < cluster.workers and inter is None):
            return None
        return cls(intra or inf, inter or inf, per_node)

    def group(self, size: int, stride: int) -> "Group":
        """Workers that exchange with each other, `stride` ranks apart: as many of a machine as are on it."""
        here = max(1, min(size, self.per_node // stride))
        return Group(self, size, here)


@dataclass(frozen=True)
class Exchange:
    """Bytes that a device takes in, and seconds of it."""

    size: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class Group:
    """Workers that exchange with each other, `here` of them on each machine."""

    links: Links
    size: int
    here: int

    def ring(self, whole: float) -> Exchange:
        """Gathering so many bytes, or scattering sums: in rings, which enter a machine by all links of the group."""
        nodes = -(-self.size // self.here)
        within = whole * (self.size - 1) / self.size if self.here > 1 else 0.0
        between = whole * (nodes - 1) / nodes
        seconds = max(within / self.links.intra, between / (self.here * self.links.inter))
        return Exchange(whole * (self.size - 1) / self.size, seconds)

    def all_to_all(self, sent: float) -> Exchange:
        """Every worker sends so many bytes, an equal part to each."""
        within = sent * (self.here - 1) / self.size
        between = sent * (self.size - self.here) / self.size
        return Exchange(within + between, max(within / self.links.intra, between / self.links.inter))


def _times(number: float, each: Exchange) -> Exchange:
    return Exchange(number * each.size, number * each.seconds)


def _added(first: Exchange, second: Exchange) -> Exchange:
    return Exchange(first.size + second.size, first.seconds + second.seconds)


def _of_parameters(
    model: ModelConfig, stage: PretrainStage, cluster: ClusterConfig, links: Links
) -> dict[str, Exchange]:
    """Parameters that are gathered, gradients that are scattered and, once a step, summed over the copies."""
    layout, passes = Layout.of(cluster), micro_batches(stage, cluster)[1]
    shards, apart = layout.shards, layout.expert_parallel
    common, experts = _sizes(model)
    table = model.vocab_size * model.hidden_size * (1 if model.tie_word_embeddings else 2)
    shared, cut = links.group(shards, 1), links.group(shards // apart, apart)
    copies = links.group(cluster.workers // shards, shards)
    width = PRECISIONS[stage.precision].weights
    # A layer is gathered forward and backward, and to count what goes to which expert; embedding and head once.
    gathers = 2 + int(counts_first(model, stage, passes))
    forward = _added(shared.ring(width * (gathers * common + table)), cut.ring(width * gathers * experts / apart))
    backward = _added(shared.ring(FLOAT * (common + table)), cut.ring(FLOAT * experts / apart))
    summed = _times(2, copies.ring(FLOAT * (common + table + experts) / shards))
    return {
        "all-gather": _times(passes, forward),
        "reduce-scatter": _times(passes, backward),
        "all-reduce": summed,
    }


def _of_rows(model: ModelConfig, stage: PretrainStage, cluster: ClusterConfig, links: Links) -> dict[str, Exchange]:
    """Rows that travel to their experts and back, in every pass over a layer."""
    apart = cluster.expert_parallel
    if apart == 1:
        return {}
    rows, passes = micro_batches(stage, cluster)
    precision = PRECISIONS[stage.precision]
    sent = rows * stage.sequence_length * model.num_experts_per_tok * model.hidden_size * precision.compute
    again = int(cluster.activation_checkpointing) + int(counts_first(model, stage, passes))
    times = passes * model.num_sparse_layers * 2 * (2 + again)
    return {"all-to-all": _times(times, links.group(apart, 1).all_to_all(sent))}


def _sizes(model: ModelConfig) -> tuple[int, int]:
    """Parameters of all layers: those that all workers of a shard group gather, and those of experts."""
    common = experts = 0
    for layer, number in kinds(model).items():
        params = layer_params(model, layer)
        of_experts = sum(size for role, size in params.items() if role.startswith("mlp.experts."))
        experts += number * of_experts
        common += number * (sum(params.values()) - of_experts)
    return common, experts
