"""What a training step does: the optimizer, its rate over a stage, the router's losses, and steps that go wrong."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from aquilamoe.config.network import (
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
    """What is different for the parameters of one role; `weight_decay` null is the optimizer's."""

    learning_rate_ratio: PositiveFloat = 1.0
    weight_decay: NonNegativeFloat | None = None


class OptimizerConfig(Config):
    """`betas` and `eps` are AdamW's; `momentum` is that of `muon`, which leaves what is no hidden matrix to AdamW.

    `roles` overrides values for some parameters: embedding (a tied head, too) | head | attention | feed_forward
    (a shared expert, too) | expert (those that a router chooses) | router | norm.
    """

    name: Literal["adamw", "muon"]
    betas: tuple[Fraction, Fraction]
    momentum: Annotated[Float, Field(ge=0.0, lt=1.0)]
    eps: PositiveFloat
    weight_decay: NonNegativeFloat
    max_grad_norm: PositiveFloat
    roles: dict[Role, RoleConfig] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check_norms(self) -> Self:
        if "norm" in self.roles and self.roles["norm"].weight_decay:
            raise ValueError(
                f"roles.norm.weight_decay {self.roles['norm'].weight_decay}, but only matrices are decayed, and norms "
                "have none; leave it out"
            )
        return self


class ScheduleConfig(Config):
    """Learning rate over a stage, as fractions of its `learning_rate`; all lengths are tokens."""

    name: Literal["cosine", "wsd", "constant"]
    warmup_tokens: NonNegativeInt
    decay_tokens: NonNegativeInt
    min_lr_ratio: Fraction


class RouterConfig(Config):
    """Losses of the router, and the bias that balances its choice without a loss (METHODS: Scale-Out)."""

    balance_loss_coeff: NonNegativeFloat
    balance_scope: Literal["global_batch", "running", "micro_batch"]
    z_loss_coeff: NonNegativeFloat
    bias_update_rate: NonNegativeFloat = 0.0


class SpikesConfig(Config):
    """What happens at a step whose loss is not finite, or whose gradient norm exceeds a limit."""

    policy: Literal["stop", "skip", "roll_back"] = "stop"
    max_grad_norm: PositiveFloat | None = None
    max_events: PositiveInt = 10
