"""The final checkpoint in the dtype and shape that others load: a directory that `transformers` opens."""

from typing import cast

from aquilamoe.config.graph import Node
from aquilamoe.config.schema import ExportStage
from aquilamoe.estimates.work import moving_s
from aquilamoe.pipeline.stage import Context, Estimate, Metrics

VERSION = 1
RESUMES = False
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def estimate(node: Node) -> Estimate:
    assert node.model is not None
    written = node.model.num_params * BYTES[cast(ExportStage, node.stage).dtype]
    seconds = moving_s(node.model.num_params * BYTES["float32"] + written)
    return Estimate(disk_bytes=written, seconds=seconds, work=seconds)


def run(context: Context) -> Metrics:
    import torch

    from aquilamoe.checkpoint.continuing import carry
    from aquilamoe.checkpoint.hf_config import read_eos_token_id
    from aquilamoe.checkpoint.state_dict import load_model, save_model

    node, stage = context.node, cast(ExportStage, context.node.stage)
    assert node.model is not None
    source, target = context.inputs["source"].directory / "model", context.out / "model"
    dtype = getattr(torch, stage.dtype)
    save_model(load_model(source), target, dtype=dtype, eos_token_id=read_eos_token_id(source))
    carry(source, target, node.model, stage.dtype)
    return {"params_total": node.model.num_params, "params_active": node.model.num_active_params}
