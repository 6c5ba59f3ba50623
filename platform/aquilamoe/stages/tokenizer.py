"""A byte-level BPE tokenizer, trained on the training split, one from elsewhere, or a checkpoint's."""

from typing import cast

from aquilamoe.config.graph import Node
from aquilamoe.config.schema import TokenizerStage
from aquilamoe.pipeline.stage import Context, Estimate, Metrics

VERSION = 1
RESUMES = False


def estimate(node: Node) -> Estimate:
    return Estimate(grows_with=(("corpus",),) if "corpus" in node.stage.inputs else ())


def run(context: Context) -> Metrics:
    stage = cast(TokenizerStage, context.node.stage)
    assert stage.vocab_size is not None, "a checkpoint's size is known before a stage runs"
    if "checkpoint" in context.inputs:
        from aquilamoe.data.vocabulary import adopt_checkpoint_tokenizer

        checkpoint = context.inputs["checkpoint"].directory / "model"
        return dict(adopt_checkpoint_tokenizer(checkpoint, stage.vocab_size, context.out))
    if stage.path is not None:
        from aquilamoe.data.vocabulary import adopt_tokenizer

        return dict(adopt_tokenizer(stage.path, stage.sha256, stage.vocab_size, context.out))
    from aquilamoe.data.tokenizer import train_tokenizer

    return dict(train_tokenizer(context.inputs["corpus"].directory, stage.vocab_size, context.out))
