"""The corpus as token files."""

from aquilamoe.config.graph import Node
from aquilamoe.pipeline.stage import Context, Estimate, Metrics
from aquilamoe.pipeline.store import SCRATCH

VERSION = 1
RESUMES = True  # every shard that is finished


def estimate(_: Node) -> Estimate:
    return Estimate(grows_with=(("corpus",),))


def run(context: Context) -> Metrics:
    from aquilamoe.data.encoding import tokenize_corpus

    corpus, tokenizer = context.inputs["corpus"], context.inputs["tokenizer"]
    return dict(
        tokenize_corpus(
            corpus.directory,
            tokenizer.directory,
            context.out,
            progress=lambda done, total: context.progress(done, total, "documents"),
            scratch=context.out / SCRATCH,
            processes=context.cluster.data_processes,
        )
    )
