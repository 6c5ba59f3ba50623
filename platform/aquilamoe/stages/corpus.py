"""Documents by language and split."""

from typing import cast

from aquilamoe.config.graph import Node
from aquilamoe.config.schema import CorpusStage
from aquilamoe.pipeline.stage import Context, Estimate, Metrics

VERSION = 1
RESUMES = False


def estimate(_: Node) -> Estimate:
    return Estimate()


def run(context: Context) -> Metrics:
    from aquilamoe.data.corpus import prepare_corpus

    return dict(prepare_corpus(cast(CorpusStage, context.node.stage), context.out))
