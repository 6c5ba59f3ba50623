"""Training, from scratch or from a checkpoint."""

from functools import partial
from typing import cast

from aquilamoe.config.graph import Node
from aquilamoe.config.schema import PretrainStage
from aquilamoe.estimates.work import per_token
from aquilamoe.pipeline.stage import Context, Estimate, Metrics
from aquilamoe.pipeline.store import read_points
from aquilamoe.process.stopping import forget_request

VERSION = 1
RESUMES = True

# float32 weights and Adam's two moments; while training also two checkpoints of the same.
BYTES_PER_PARAMETER = 12


def estimate(node: Node) -> Estimate:
    assert node.model is not None
    work = node.tokens * per_token(node.model, cast(PretrainStage, node.stage))
    return Estimate(disk_bytes=node.model.num_params * BYTES_PER_PARAMETER, work=work)


def run(context: Context) -> Metrics:
    forget_request(context.out)  # before imports take their seconds: from now on requests are to this run
    from aquilamoe.checkpoint.companions import copy_companions
    from aquilamoe.checkpoint.continuing import carry
    from aquilamoe.checkpoint.hf_config import write_config
    from aquilamoe.data.tokens import read_record
    from aquilamoe.growth.new_parts import counted, new_parts
    from aquilamoe.training.job import Job
    from aquilamoe.training.metrics import recovery_tokens
    from aquilamoe.training.ray.launch import launch

    node, stage = context.node, cast(PretrainStage, context.node.stage)
    source = context.inputs.get("source")
    tokens = context.inputs["tokens"]
    assert node.model is not None
    job = Job(
        name=node.name,
        stage=stage,
        model=node.model,
        tokens=tokens.directory,
        source=source.directory if source else None,
        out=context.out,
        ancestor_tokens=node.ancestor_tokens,
        ancestor_flops=node.ancestor_flops,
        cluster=context.cluster,
        beginning=node.growths[0].source if node.growths else None,
        marks=partial(new_parts, counted(node.growths, stage.optimizer.groups)) if node.growths else None,
    )
    metrics: Metrics = {
        "params_total": node.model.num_params,
        "params_active": node.model.num_active_params,
        **launch(job, context.root),
        **(node.before.metrics if node.before else {}),
    }
    forget_request(context.out)
    if source:
        carry(source.directory / "model", context.out / "model", node.model, "float32")
    else:
        copy_companions(tokens.directory / "tokenizer", context.out / "model")
        write_config(context.out / "model", node.model, "float32", read_record(tokens.directory).eos_token_id)
    goal = source.metrics.get("source_final_loss") if source else None
    if goal is not None:
        assert source is not None
        recovery = recovery_tokens(read_points(context.metrics_file), float(goal), job.stage.batch_tokens)
        if source.metrics.get("preserving"):
            recovery = 0  # certified: the function was never left, whatever rounding makes of its loss
        per_token = node.model.flops_per_token(job.stage.sequence_length)
        metrics["recovery_tokens"] = recovery
        metrics["recovery_flops"] = None if recovery is None else recovery * per_token
    return metrics
