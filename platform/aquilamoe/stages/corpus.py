"""Documents by language and split."""

from typing import cast

from aquilamoe.config.graph import Node
from aquilamoe.config.messages import UserError
from aquilamoe.config.schema import CorpusStage
from aquilamoe.pipeline.stage import Context, Estimate, Metrics
from aquilamoe.pipeline.store import SCRATCH

VERSION = 1
RESUMES = True  # of a corpus that is cleaned, every shard that is finished


def estimate(node: Node) -> Estimate:
    return Estimate(work=_source_bytes(cast(CorpusStage, node.stage)))


def _source_bytes(stage: CorpusStage) -> float | None:
    """Of all files that it reads; None where they cannot be counted: of a hub's data set, or of files elsewhere."""
    from aquilamoe.data.corpus import source_files

    total = 0
    for name, source in stage.sources.items():
        if source.path is None:
            return None
        try:
            files = source_files(name, source.model_copy(update={"sha256": None}))
            total += sum(path.stat().st_size for path in files)
        except (UserError, OSError, ValueError):
            return None
    return float(total) or None


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
