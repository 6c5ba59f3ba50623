"""The corpus as token files."""

from aquilamoe.config.graph import Node
from aquilamoe.pipeline.stage import Context, Estimate, Metrics

VERSION = 1
RESUMES = False


def estimate(_: Node) -> Estimate:
    return Estimate()


def run(context: Context) -> Metrics:
    from aquilamoe.data.tokens import tokenize_corpus

    corpus, tokenizer = context.inputs["corpus"], context.inputs["tokenizer"]
    return dict(
        tokenize_corpus(
            corpus.directory,
            tokenizer.directory,
            context.out,
            progress=lambda done, total: context.progress(done, total, "documents"),
        )
    )
