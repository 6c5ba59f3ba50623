"""What a training step does: the optimizer, its rate over a stage, the router's losses, and steps that go wrong."""

from typing import Literal, Self

from pydantic import Field, model_validator

from aquilamoe.config.numbers import (
    Config,
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


class OptimizerConfig(Config):
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
