"""What the time of a training grows with: from one that was measured, another on the same device is estimated."""

from aquilamoe.config.network import ModelConfig
from aquilamoe.config.schema import PretrainStage
from aquilamoe.estimates.activations import FLOAT, PRECISIONS, Pass, cast_bytes, layer_bytes
from aquilamoe.estimates.memory import kinds
from aquilamoe.model.kernels.choice import Kernels

# Products of small matrices wait for memory: a byte of what a forward pass keeps takes as long as so many FLOPs.
# Of large models it is a hundredth. `benchmarks/estimates.py` shows what becomes of it, in float32 on one core.
FLOPS_A_BYTE = 100.0


# What a stage that reads and writes weights takes: to start, for a byte on a usual disk, and for a FLOP on some cores.
START_S = 4.0
DISK_BYTES_PER_S = 1e9
FLOPS_PER_S = 1e11


def moving_s(num_bytes: float, flops: float = 0.0) -> float:
    """Seconds to read and write so many bytes, and to compute so many FLOPs, on a usual machine."""
    return START_S + num_bytes / DISK_BYTES_PER_S + flops / FLOPS_PER_S


def per_token(model: ModelConfig, stage: PretrainStage) -> float:
    """FLOPs of a token, those of the model and those that activations and logits are worth."""
    run = Pass(1, stage.sequence_length, "cpu", PRECISIONS[stage.precision], Kernels("auto", "auto"))
    kept = sum(
        number * (layer_bytes(model, layer, run) - cast_bytes(model, layer, run))
        for layer, number in kinds(model).items()
    )
    return model.flops_per_token(run.length) + FLOPS_A_BYTE * (kept / run.tokens + FLOAT * model.vocab_size)
