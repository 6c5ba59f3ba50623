"""Where and how stages run: workers, devices, sharding, checkpoints."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from aquilamoe.config.numbers import Config, Float, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from aquilamoe.config.passwords import masked

# Of a whole run: its one Ray session, and what prepares text before any stage trains.
RUN_KEYS = ("executor", "address", "runtime_env", "data_processes")


class ClusterConfig(Config):
    """Where and how stages run. Nothing here enters a fingerprint."""

    executor: Literal["ray", "process"] = Field(
        description="Launcher of the training. ray: workers of Ray Train | process: in the process of the command"
    )
    address: str | None = Field(
        description="Ray cluster: auto on one of its machines, or ray://host:10001; null: a Ray session on this machine"
    )
    workers: PositiveInt = Field(description="Data-parallel training processes [processes]")
    cpus_per_worker: PositiveInt = Field(description="Cores of a worker, and threads of one without a GPU [cores]")
    gpus_per_worker: NonNegativeInt = Field(description="GPUs of a worker [GPUs]")
    gpu_memory_bytes: NonNegativeInt = Field(description="Memory that each GPU must have; 0: not checked [bytes]")
    max_failures: NonNegativeInt = Field(
        description="Restarts of lost workers from the last checkpoint before the run ends [times]"
    )
    micro_batch_tokens: PositiveInt = Field(
        description="Largest forward pass of a worker; the gradients of several are accumulated to a step [tokens]"
    )
    checkpoint_every_tokens: PositiveInt = Field(description="Interval between checkpoints of a stage [tokens]")
    checkpoint_every_s: PositiveFloat | None = Field(
        default=None, description="Longest time between checkpoints of a stage; null: by tokens alone [s]"
    )
    keep_every_tokens: PositiveInt | None = Field(
        default=None,
        description="Interval between checkpoints that stay, in paths.root/milestones; null: the last two alone, until "
        "the stage is complete [tokens]",
    )
    metrics_every_s: PositiveFloat | None = Field(
        default=None,
        description="Longest time between points of a curve, which are then means over the steps since the point "
        "before; null: 200 points of single steps [s]",
    )
    compile: bool = Field(description="Whether torch.compile compiles every block; pays in long runs on large models")
    flops_per_s: PositiveFloat | None = Field(
        description="Training speed on all devices that action=plan assumes before a first run has measured it; null: "
        "device_flops_per_s and mfu, or a short measurement of the processors [FLOP/s]"
    )
    device_flops_per_s: PositiveFloat | None = Field(
        default=None, description="Peak of one device in the precision of training, dense; null: unknown [FLOP/s]"
    )
    kernel_efficiency: Annotated[Float, Field(gt=0.0, le=1.0)] | None = Field(
        default=None,
        description="Share of that peak that large matrix products reach in training, with what runs between them; "
        "null: unknown [fraction]",
    )
    workers_per_node: PositiveInt | None = Field(
        default=None, description="Workers of one machine, for estimates; null: all [workers]"
    )
    intra_node_bandwidth: PositiveFloat | None = Field(
        default=None,
        description="What a worker takes in from workers of its machine, for estimates; null: unknown [bytes/s]",
    )
    inter_node_bandwidth: PositiveFloat | None = Field(
        default=None,
        description="What a worker takes in from workers of other machines, for estimates; null: unknown [bytes/s]",
    )
    mfu: Annotated[Float, Field(gt=0.0, le=1.0)] | None = Field(
        default=None,
        description="Share of that peak that a whole training reaches, if it was measured; null: predicted by layout "
        "[fraction]",
    )
    price_per_device_hour: NonNegativeFloat = Field(
        default=0.0,
        description="Price of a device, a worker's GPU or a worker without one; 0: not counted [any currency per hour]",
    )
    device_watts: NonNegativeFloat = Field(
        default=0.0, description="Power of one device under load, to estimate the energy; 0: not counted [W]"
    )
    parallel: Literal["ddp", "fsdp", "hsdp"] = Field(
        default="ddp",
        description="Where the model is. ddp: a copy in every worker | fsdp: sharded over all workers | hsdp: sharded "
        "over groups of shard_size workers, replicated across groups",
    )
    shard_size: PositiveInt | None = Field(
        default=None, description="Workers that share one copy of the model with hsdp; null with the others [workers]"
    )
    expert_parallel: PositiveInt = Field(
        default=1, description="Workers that share the experts of a layer; 1: all in every worker [workers]"
    )
    activation_checkpointing: bool = Field(
        default=False,
        description="Whether only the blocks' inputs are kept, and the rest is computed again in the backward pass",
    )
    attention: Literal["auto", "sdpa", "explicit"] = Field(
        default="auto",
        description="Attention kernel. auto: the one measured to be fastest on the device | sdpa: torch's | explicit",
    )
    experts: Literal["auto", "grouped", "loop"] = Field(
        default="auto",
        description="Expert kernel. auto: the one measured to be fastest | grouped: one grouped product | loop: an "
        "expert after the other",
    )
    min_workers: PositiveInt | None = Field(
        default=None, description="Fewest workers to continue with after a loss; null: all of them [workers]"
    )
    start_timeout_s: PositiveFloat = Field(
        default=300.0, description="Longest wait for the cluster to have the required resources [s]"
    )
    data_processes: PositiveInt | None = Field(
        default=None,
        description="Processes that prepare and tokenise a corpus; null: one for each core, one for a small corpus "
        "[processes]",
    )
    runtime_env: dict[str, Any] = Field(
        default_factory=dict,
        description="Ray's runtime_env on a cluster with an address, e.g. {py_modules: [platform/aquilamoe]} sends "
        "this code to machines that lack it",
    )

    @model_validator(mode="after")
    def _check_runtime_env(self) -> Self:
        if self.runtime_env and self.address is None:
            raise ValueError(
                f"runtime_env {masked(self.runtime_env)} without address; it is for the machines of a cluster, on this "
                "one the environment is that of the command: set address, or runtime_env to {}"
            )
        return self

    @model_validator(mode="after")
    def _check_layout(self) -> Self:
        if (self.parallel == "hsdp") != (self.shard_size is not None):
            raise ValueError(
                f"parallel {self.parallel} with shard_size {self.shard_size}; shard_size, the workers that share one "
                "copy of the model, is for parallel hsdp and null for the others"
            )
        if self.workers % (self.shard_size or 1):
            raise ValueError(
                f"{self.workers} workers are no multiple of shard_size {self.shard_size}; choose a divisor of "
                f"{self.workers}, or other workers"
            )
        if self.expert_parallel > 1 and self.parallel == "ddp":
            raise ValueError(
                f"expert_parallel {self.expert_parallel} with parallel ddp, where every worker has all experts; choose "
                "parallel fsdp or hsdp, or expert_parallel 1"
            )
        group = self.shard_size or self.workers
        if group % self.expert_parallel:
            raise ValueError(
                f"{group} workers that share one copy of the model are no multiple of expert_parallel "
                f"{self.expert_parallel}; choose a divisor of {group}"
            )
        return self
