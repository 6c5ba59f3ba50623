"""A byte-level BPE tokenizer, trained on the training split."""

from typing import cast

from aquilamoe.config.graph import Node
from aquilamoe.config.schema import TokenizerStage
from aquilamoe.pipeline.stage import Context, Estimate, Metrics

VERSION = 1
RESUMES = False


def estimate(_: Node) -> Estimate:
    return Estimate()


def run(context: Context) -> Metrics:
    from aquilamoe.data.tokenizer import train_tokenizer

    stage = cast(TokenizerStage, context.node.stage)
    return dict(train_tokenizer(context.inputs["corpus"].directory, stage.vocab_size, context.out))
