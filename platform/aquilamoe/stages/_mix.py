"""A mix of several sources: routers from text, the growth, and its certificate on the text of each source."""

from aquilamoe.config.schema import UpcyclingConfig
from aquilamoe.pipeline.stage import Context, Metrics
from aquilamoe.stages import _growth


def run(context: Context, upcycling: UpcyclingConfig) -> Metrics:
    """Make the sources the experts of one checkpoint; return its certificate and sizes."""
    import torch

    from aquilamoe.config.schema import ScaleOutStage
    from aquilamoe.growth import mix, mix_certificate, mix_router

    node, stage = context.node, context.node.stage
    assert isinstance(stage, ScaleOutStage) and node.model is not None and upcycling.texts is not None
    sources = [context.inputs[role].directory / "model" for role in ("source", *stage.further)]
    target, routers = context.out / "model", None
    if upcycling.router_init in mix.FITTED:
        count = upcycling.calibration_tokens or 0
        texts = [torch.from_numpy(_growth.training_text(context, count, text)) for text in upcycling.texts]
        routers = mix_router.fit(
            sources,
            node.model,
            upcycling,
            stage.seed,
            texts,
            progress=lambda done, total: context.progress(done, total, "layers"),
        )
    mix.mix(
        sources,
        target,
        node.model,
        upcycling,
        stage.seed,
        progress=lambda done, total: context.progress(done, total, "tensors"),
        routers=routers,
    )
    tokens = stage.certificate_tokens // len(sources)
    named = [(text, torch.from_numpy(_growth.held_out(context, tokens, text))) for text in upcycling.texts]
    certificate = mix_certificate.certify(
        sources,
        target,
        named,
        tolerance=stage.tolerance,
        progress=lambda done, total: context.progress(done, total, "layers"),
    )
    return _growth.described(context, certificate)
