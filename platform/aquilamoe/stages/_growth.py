"""What both growth stages share: check, grow, and certify on held-out tokens."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from aquilamoe.config.graph import Node
from aquilamoe.config.messages import UserError
from aquilamoe.config.schema import GrowthConfig, GrowthStage, UpcyclingConfig
from aquilamoe.estimates import work
from aquilamoe.files import write_atomically
from aquilamoe.growth import rules
from aquilamoe.growth.claim import Claim
from aquilamoe.pipeline.stage import Context, Estimate, Metrics
from aquilamoe.pipeline.store import to_json

if TYPE_CHECKING:
    import numpy as np

    from aquilamoe.growth.split import Split

CERTIFICATE = "certificate.json"
SEQUENCE_LENGTH = 128
BYTES_PER_PARAMETER = 4
FORWARD = 1 / 3  # of the FLOPs of a training step, which a certificate takes of both models


def estimate(node: Node, growth: GrowthConfig | UpcyclingConfig) -> Estimate:
    """Refuse a growth that cannot be done; otherwise report the size of its output."""
    assert node.model is not None and node.source_model is not None
    try:
        rules.check(node.source_model, node.model, growth)
        if node.other_models:
            names = [node.stage.inputs[role] for role in ("source", *node.stage.further)]
            models = [node.source_model, *node.other_models]
            rules.check_sources(list(zip(names, models, strict=True)), node.model)
    except UserError as error:
        # A rule's message begins with the field: of the model, or of the growth itself.
        inside = "" if str(error).startswith(("growth", "upcycling", "sources")) else "model."
        raise UserError(f"stages.{node.name}.{inside}{error}") from None
    read = sum(model.num_params for model in (node.source_model, *node.other_models))
    moved = BYTES_PER_PARAMETER * (read + node.model.num_params)
    per_token = sum(
        model.flops_per_token(SEQUENCE_LENGTH) for model in (node.source_model, *node.other_models, node.model)
    )
    certified = FORWARD * per_token * cast(GrowthStage, node.stage).certificate_tokens
    calibrated = growth.calibration_tokens or 0 if isinstance(growth, UpcyclingConfig) else 0
    calibrated *= 1 + len(node.other_models)
    certified += FORWARD * node.source_model.flops_per_token(SEQUENCE_LENGTH) * calibrated
    seconds = work.moving_s(moved, certified)
    warnings = tuple(f"model.{line}" for line in rules.warnings(growth, node.source_model, node.model))
    written = BYTES_PER_PARAMETER * node.model.num_params
    return Estimate(disk_bytes=written, seconds=seconds, work=seconds, warnings=warnings)


def run(
    context: Context,
    growth: GrowthConfig | UpcyclingConfig,
    grow: Callable[..., dict[str, str]],
    split: "Split | None" = None,
) -> Metrics:
    """Grow the source's checkpoint; return its certificate and sizes. UserError if a preserving growth is off."""
    import torch

    from aquilamoe.growth.certificate import certify

    node = context.node
    stage = cast(GrowthStage, context.node.stage)
    assert node.model is not None and node.source_model is not None
    before, after = context.inputs["source"].directory / "model", context.out / "model"
    grow(
        before,
        after,
        node.model,
        growth,
        stage.seed,
        progress=lambda done, total: context.progress(done, total, "tensors"),
    )
    preserving = rules.preserves(growth, node.source_model, node.model)
    tokens_bt = torch.from_numpy(held_out(context, stage.certificate_tokens))
    claim = Claim(preserving=preserving, tolerance=stage.tolerance, growth=growth, seed=stage.seed, split=split)
    certificate: dict[str, Any] = certify(
        before, after, tokens_bt, claim, lambda done, total: context.progress(done, total, "layers")
    )
    if growth.method != "split":
        certificate.pop("experts", None)  # the same recipe makes the same files as in older stores
    return described(context, certificate)


def described(context: Context, certificate: dict[str, Any]) -> Metrics:
    """Write the certificate of a growth; return it and the sizes as metrics, which are single values."""
    node = context.node
    assert node.model is not None
    write_atomically(context.out / CERTIFICATE, to_json(certificate, node.name))
    for key in ("layers", "rounding"):
        del certificate[key]
    experts, mix = certificate.pop("experts", {}), certificate.pop("mix", None)
    return {
        "params_total": node.model.num_params,
        "params_active": node.model.num_active_params,
        "lineage_tokens": node.lineage_tokens,
        "lineage_flops": node.lineage_flops,
        **(node.before.metrics if node.before else {}),
        "source_final_loss": context.inputs["source"].metrics.get("loss_end"),
        "certificate_tokens": certificate.pop("tokens"),
        **certificate,
        **{key: value for key, value in experts.items() if isinstance(value, float)},
        **({} if mix is None else _of_texts(mix)),
    }


def _of_texts(mix: dict[str, Any]) -> Metrics:
    """What a mix makes of each text."""
    measures = {"loss": mix["mix_losses"], "own_expert": mix["own_expert"]}
    return {f"{key}_{text}": values[i] for key, values in measures.items() for i, text in enumerate(mix["texts"])}


def calibrate(context: Context, upcycling: UpcyclingConfig) -> "Split":
    """Find what separates the copies of an expert, on tokens of the training split."""
    import torch

    from aquilamoe.growth.split import calibrate

    node, source = context.node, context.inputs["source"].directory / "model"
    assert node.model is not None
    count = upcycling.calibration_tokens or 0
    tokens_bt = torch.from_numpy(training_text(context, count)) if count else None
    seed = cast(GrowthStage, node.stage).seed

    def progress(done: int, total: int) -> None:
        context.progress(done, total, "layers")

    return calibrate(source, node.model, upcycling, seed, tokens_bt, progress=progress)


def training_text(context: Context, tokens: int, *of: str) -> "np.ndarray":
    """Training sequences (rows, length), languages in equal parts, all or those of `of`, by the stage's seed."""
    from aquilamoe.data.loader import Batches
    from aquilamoe.data.tokens import read_record

    assert context.node.model is not None
    directory = context.inputs["tokens"].directory
    sources = read_record(directory).sources
    length = min(SEQUENCE_LENGTH, context.node.model.max_position_embeddings - 1)
    rows = max(1, tokens // length)
    seed = cast(GrowthStage, context.node.stage).seed
    return Batches(directory, dict.fromkeys(of or sources, 1.0), length, rows, seed).read(0)[:, :-1]


def held_out(context: Context, tokens: int, *of: str) -> "np.ndarray":
    """Validation sequences (rows, length + 1), languages in equal parts, all or those of `of`."""
    import numpy as np

    from aquilamoe.data.loader import validation_batches
    from aquilamoe.data.tokens import read_record

    assert context.node.model is not None
    directory = context.inputs["tokens"].directory
    sources = of or tuple(read_record(directory).sources)
    length = min(SEQUENCE_LENGTH, context.node.model.max_position_embeddings - 1)
    rows = max(1, tokens // len(sources) // length)
    return np.concatenate(
        [next(iter(validation_batches(directory, source, length, rows * length, rows))) for source in sources]
    )
