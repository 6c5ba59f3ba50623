"""A whole training job of small sizes, of which one changes what one looks at: what tests and benchmarks start from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aquilamoe.config.schema import ClusterConfig, ModelConfig, PretrainStage
from aquilamoe.training.job import Job

Values = Mapping[str, Any]
LENGTH = 16
ROWS = 8
VOCABULARY = 64
BATCH = LENGTH * ROWS  # tokens of a step
MODEL: Values = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 32,
    "rope_theta": 1e4,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.05,
    "qkv_bias": True,
    "tie_word_embeddings": False,
    "num_experts": 0,
    "num_experts_per_tok": 0,
}
STAGE: Values = {
    "kind": "pretrain",
    "inputs": {"tokens": "tokens"},
    "total_tokens": 20 * BATCH,
    "equal_flops": None,
    "batch_tokens": BATCH,
    "sequence_length": LENGTH,
    "mixture": {"en": 1.0},
    "learning_rate": 0.005,
    "precision": "fp32",
    "optimizer_state": "reset",
    "seed": 1,
    "optimizer": {
        "name": "adamw",
        "betas": (0.9, 0.95),
        "momentum": 0.95,
        "eps": 1e-8,
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
    },
    "schedule": {"name": "constant", "warmup_tokens": 0, "decay_tokens": 0, "min_lr_ratio": 1.0},
    "router": {"balance_loss_coeff": 0.01, "balance_scope": "global_batch", "z_loss_coeff": 0.001},
    "validate_every_tokens": 10 * BATCH,
    "validation_tokens": 10 * LENGTH,
}
CLUSTER: Values = {
    "executor": "process",
    "address": None,
    "workers": 1,
    "cpus_per_worker": 1,
    "gpus_per_worker": 0,
    "gpu_memory_bytes": 0,
    "max_failures": 0,
    "micro_batch_tokens": BATCH,
    "checkpoint_every_tokens": 10**9,
    "compile": False,
    "flops_per_s": 1e9,
}


def model(**changes: Any) -> ModelConfig:
    """A small network; with `num_experts` and nothing else a Mixture of Experts that chooses two of them."""
    chosen = {"num_experts_per_tok": 2} if changes.get("num_experts") else {}
    return ModelConfig.model_validate(changed(MODEL, chosen | changes))


def cluster(**changes: Any) -> ClusterConfig:
    """This process."""
    return ClusterConfig.model_validate(changed(CLUSTER, changes))


def job(tokens: Path = Path(), out: Path = Path(), **changes: Any) -> Job:
    """A job of 20 steps on one language, "en", of data whose vocabulary has 64 tokens.

    changes: fields of the model, the stage or the cluster, by name. A mapping for `optimizer`, `schedule` or `router`
    changes only what is in it; `network`, a ModelConfig, takes the place of all fields of the model.
    """
    network = changes.pop("network", None) or model(**_taken(changes, ModelConfig.model_fields))
    here = cluster(**_taken(changes, ClusterConfig.model_fields))
    stage = PretrainStage.model_validate(changed({**STAGE, "model": network}, changes))
    return Job(
        name="small",
        stage=stage,
        model=network,
        tokens=tokens,
        source=None,
        out=out,
        ancestor_tokens=0,
        ancestor_flops=0,
        cluster=here,
    )


def changed(values: Values, changes: Values) -> dict[str, Any]:
    """The values with the changes, those of optimizer, schedule and router one by one."""
    inner = ("optimizer", "schedule", "router")
    return {
        **values,
        **{k: {**values[k], **v} if k in inner and isinstance(v, Mapping) else v for k, v in changes.items()},
    }


def _taken(changes: dict[str, Any], names: Values) -> dict[str, Any]:
    """Those of the changes that have one of the names, taken out of them."""
    return {name: changes.pop(name) for name in list(changes) if name in names}
