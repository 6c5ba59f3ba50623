"""What a training step does: the optimizer, its rate over a stage, the router's losses, and steps that go wrong."""

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from aquilamoe.config.inheritance import without_null
from aquilamoe.config.numbers import (
    Config,
    Extended,
    Float,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)

Role = Literal["embedding", "head", "attention", "feed_forward", "expert", "router", "norm"]


class RoleConfig(Config):
    """What is different for the parameters of one role."""

    learning_rate_ratio: PositiveFloat = Field(default=1.0, description="Learning rate [ratio to the stage's]")
    weight_decay: NonNegativeFloat | None = Field(
        default=None, description="Weight decay; null: the optimizer's [per step and learning rate]"
    )


class OldPartsConfig(Config):
    """How the parts of a grown model train that are its source's."""

    learning_rate_ratio: NonNegativeFloat = Field(
        default=1.0, description="Learning rate; 0: frozen [ratio to the stage's]"
    )


class NewPartsConfig(Config):
    """How the parts of a grown model train that are further copies, padding or initialised."""

    learning_rate_ratio: NonNegativeFloat = Field(
        default=1.0, description="Learning rate after the re-warm-up; 0: frozen [ratio to the stage's]"
    )
    rewarm_tokens: NonNegativeInt = Field(
        default=0, description="Linear re-warm-up of the new parts alone, from rewarm_from; 0: none [tokens]"
    )
    rewarm_from: NonNegativeFloat = Field(
        default=1.0, description="Learning rate where the re-warm-up begins [ratio to the stage's]"
    )

    def ratio_after(self, tokens: int) -> float:
        """Ratio to the stage's learning rate when the stage has trained on so many tokens."""
        if tokens >= self.rewarm_tokens:
            return self.learning_rate_ratio
        return self.rewarm_from + (self.learning_rate_ratio - self.rewarm_from) * tokens / self.rewarm_tokens


class GroupsConfig(Config):
    """What trains after a growth: the new parts of the model and the old ones."""

    new: NewPartsConfig = Field(default=NewPartsConfig(), description="Further copies, padding, initialised weights")
    old: OldPartsConfig = Field(default=OldPartsConfig(), description="All other weights: the source's")
    growths: Literal["all", "last"] = Field(
        default="all",
        description="Growths whose parts are new. all: of the line of checkpoints | last: those without a training "
        "between them and the last one",
    )

    @field_validator("new", "old", mode="before")
    @classmethod
    def _read_ratio(cls, values: Any) -> Any:
        """`old=0` is `old.learning_rate_ratio=0`."""
        is_number = isinstance(values, (int, float)) and not isinstance(values, bool)
        return {"learning_rate_ratio": values} if is_number else without_null(values)

    @model_validator(mode="after")
    def _check_ratios(self) -> Self:
        if not self.new.learning_rate_ratio and not self.old.learning_rate_ratio:
            raise ValueError("new and old have learning_rate_ratio 0, so that nothing trains; raise one of them")
        return self

    @property
    def are_one(self) -> bool:
        """Whether all parts train alike."""
        return self == GroupsConfig(growths=self.growths)

    @property
    def freezes(self) -> bool:
        """Whether some parts do not train."""
        return not (self.new.learning_rate_ratio and self.old.learning_rate_ratio)


class OptimizerConfig(Extended):
    """The optimizer of a stage that trains."""

    name: Literal["adamw", "muon"] = Field(
        description="Optimizer. adamw | muon: for hidden matrices, AdamW for all other parameters"
    )
    betas: tuple[Fraction, Fraction] = Field(description="AdamW: decay rates of the two moments [fractions]")
    momentum: Float = Field(ge=0.0, lt=1.0, description="Muon: momentum [fraction]")
    eps: PositiveFloat = Field(description="AdamW: added to the root of the second moment [dimensionless]")
    weight_decay: NonNegativeFloat = Field(
        description="Decoupled weight decay, of matrices only [per step and learning rate]"
    )
    max_grad_norm: PositiveFloat = Field(description="Limit to which gradients are clipped [L2 norm]")
    roles: dict[Role, RoleConfig] = Field(
        default_factory=dict,
        description="Exceptions by role: embedding (with a tied head), head, attention, feed_forward (with a shared "
        "expert), expert, router, norm; e.g. {router: {learning_rate_ratio: 0.1}}",
    )
    groups: GroupsConfig = Field(default=GroupsConfig(), description="New and old parts of a model that was grown")
    learning_rate_scale: Literal["keep", "fan_in"] = Field(
        default="keep",
        description="Learning rate of matrices whose fan-in grew since the line of checkpoints began. keep: the "
        "stage's | fan_in: times the old fan-in over the new one, so that a step changes the function as before",
    )
    added = ("groups", "learning_rate_scale")

    @field_validator("groups", mode="before")
    @classmethod
    def _leave_out_null(cls, groups: Any) -> Any:
        return {} if groups is None else without_null(groups)

    @model_validator(mode="after")
    def _check_scale(self) -> Self:
        if self.learning_rate_scale == "fan_in" and self.name == "muon":
            raise ValueError("learning_rate_scale fan_in is a rule of AdamW, name is muon; use keep")
        if self.learning_rate_scale == "fan_in" and self.groups.new.learning_rate_ratio > 1:
            raise ValueError(
                f"learning_rate_scale fan_in lowers learning rates after a growth, groups.new.learning_rate_ratio "
                f"{self.groups.new.learning_rate_ratio:g} raises them; use one of them"
            )
        return self

    @model_validator(mode="after")
    def _check_norms(self) -> Self:
        if "norm" in self.roles and self.roles["norm"].weight_decay:
            raise ValueError(
                f"roles.norm.weight_decay {self.roles['norm'].weight_decay}, but only matrices are decayed, and norms "
                "have none; leave it out"
            )
        return self


class ScheduleConfig(Config):
    """Learning rate over a stage, relative to its peak, the stage's `learning_rate`."""

    name: Literal["cosine", "wsd", "constant"] = Field(
        description="Schedule. cosine: half a cosine after the warm-up | wsd: warm-up, stable, linear decay | constant"
    )
    warmup_tokens: NonNegativeInt = Field(description="Linear warm-up from 0 [tokens]")
    decay_tokens: NonNegativeInt = Field(
        description="wsd: linear decay at the end of the stage; 0: none. No effect on the others [tokens]"
    )
    min_lr_ratio: Fraction = Field(description="Learning rate at the end of the decay [fraction of the peak]")


class RouterConfig(Config):
    """Losses of the router, and the bias that balances its choice without a loss; of Mixtures of Experts only."""

    balance_loss_coeff: NonNegativeFloat = Field(description="Weight of the load-balance loss; 0: none [dimensionless]")
    balance_scope: Literal["global_batch", "running", "micro_batch"] = Field(
        description="Tokens whose expert load is balanced. global_batch: of all workers and micro-batches, at the "
        "price of another forward pass where there are several of these | running: of the micro-batches so far | "
        "micro_batch"
    )
    z_loss_coeff: NonNegativeFloat = Field(description="Weight of the z-loss; 0: none [dimensionless]")
    bias_update_rate: NonNegativeFloat = Field(
        default=0.0,
        description="Step of a bias that balances the choice of experts without a loss, e.g. 0.001; 0: none. It is "
        "kept for further training; validation and export are without it [router score per step]",
    )


class SpikesConfig(Config):
    """What happens at a step whose loss is not finite, or whose gradient norm exceeds a limit."""

    policy: Literal["stop", "skip", "roll_back"] = Field(
        default="stop",
        description="Reaction to a spike. stop | skip: no update | roll_back: to the checkpoint before, continuing "
        "with the data after the spike",
    )
    max_grad_norm: PositiveFloat | None = Field(
        default=None, description="Largest gradient norm that is no spike; null: any finite one [L2 norm]"
    )
    max_events: PositiveInt = Field(default=10, description="Spikes of a stage; one more stops it [steps]")
