"""What a scaled rotary embedding allows a growth to change: measured on the frequencies themselves. Torch-free."""

from aquilamoe.config.messages import UserError
from aquilamoe.config.network import ModelConfig

TOLERANCE = 1e-9  # of a frequency, as a fraction


def check(source: ModelConfig, target: ModelConfig) -> None:
    """Refuse a target whose heads turn otherwise than the source's, at any length.

    A head may have grown: then pair i of the source is pair i * ratio of the target (see `growth.units`).

    Args:
        source: model that is grown.
        target: what it is grown to.

    Raises:
        UserError: the scaling is another one, or it depends on a size that grows.
    """
    before, after = source.rope_scaling, target.rope_scaling
    ratio = target.head_dim // source.head_dim
    expected = before.for_larger_heads(ratio) if before else None
    if source.rope_theta != target.rope_theta:
        raise UserError(
            f"rope_theta: target {target.rope_theta}, source {source.rope_theta}; a growth cannot change it, keep the "
            "source's"
        )
    if after != expected:
        raise UserError(
            f"rope_scaling: target {_shown(target)}, source {_shown(source)}; a growth cannot change it, keep the "
            "source's"
        )
    if before is None or after is None:
        return
    for length in (1, 2 * max(source.max_position_embeddings, target.max_position_embeddings)):
        old = before.frequencies(source.rope_theta, source.rotary_dim, source.max_position_embeddings, length)
        new = after.frequencies(target.rope_theta, target.rotary_dim, target.max_position_embeddings, length)
        pairs = zip(old[0], new[0][::ratio], strict=True)
        if abs(old[1] - new[1]) > TOLERANCE or any(abs(a - b) > TOLERANCE * a for a, b in pairs):
            field = "head_dim" if ratio > 1 else "max_position_embeddings"
            raise UserError(
                f"{field}: target {getattr(target, field)}, source {getattr(source, field)}; with rope_type "
                f"'{before.rope_type}' other frequencies would follow from it, keep the source's"
            )


def _shown(model: ModelConfig) -> str:
    scaling = model.rope_scaling
    return "none" if scaling is None else f"{scaling.model_dump(mode='json')}"
