"""Documents by language and split."""

from typing import cast

from aquilamoe.config.graph import Node
from aquilamoe.config.schema import CorpusStage
from aquilamoe.pipeline.stage import Context, Estimate, Metrics
from aquilamoe.pipeline.store import SCRATCH

VERSION = 1
RESUMES = True  # of a corpus that is cleaned, every shard that is finished


def estimate(_: Node) -> Estimate:
    return Estimate()


def run(context: Context) -> Metrics:
    stage = cast(CorpusStage, context.node.stage)
    if stage.cleaning is None:
        from aquilamoe.data.corpus import prepare_corpus

        return dict(prepare_corpus(stage, context.out))
    from aquilamoe.data.cleaning import clean_corpus

    return dict(
        clean_corpus(
            stage,
            context.out,
            context.out / SCRATCH,
            context.cluster.data_processes,
            lambda done, total: context.progress(done, total, "shards"),
        )
    )
