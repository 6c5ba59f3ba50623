"""What a target is in words, and where it is not what the source's config.json would lead one to expect."""

from aquilamoe.checkpoint import carrying, hf_config, tensor_names
from aquilamoe.checkpoint.safetensors_header import ITEM_BYTES
from aquilamoe.config.growth import ShrinkConfig
from aquilamoe.growth import rules
from aquilamoe.growth.bounds import MOST_IN_16_BITS
from aquilamoe.growth.tool.request import CheckpointFiles, Request

_WIDTHS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
_DIRECTIONS = {
    "width": _WIDTHS,
    "depth": ("num_hidden_layers",),
    "vocabulary": ("vocab_size",),
    "context length": ("max_position_embeddings",),
}


def deed(request: Request) -> str:
    """What was done to the sizes of a model: `grown in width and depth`, `shrunk in width`."""
    source, target = request.source.model, request.model
    changed = [
        name
        for name, fields in {**_DIRECTIONS, "experts": ("num_experts",)}.items()
        if any(getattr(target, field) != getattr(source, field) for field in fields)
    ]
    if not changed:
        return "copied in all its sizes"
    verb = "shrunk" if request.kind == "shrink" else "grown"
    first, last = ", ".join(changed[:-1]), changed[-1]
    return f"{verb} in {first} and {last}" if first else f"{verb} in {last}"


def remarks(request: Request) -> list[str]:
    """Sentences on a format that changes, on a head that is read otherwise than config.json declares, and warnings."""
    warnings = []
    if not isinstance(request.growth, ShrinkConfig):
        warnings = rules.warnings(request.growth, request.source.model, request.model)
    return [*_format(request), *_head(request.source), *(f"Warning: {line}." for line in warnings), *_shift(request)]


def _shift(request: Request) -> list[str]:
    """A shift of router rows that 16 bits cannot hold beside the rows."""
    shift = getattr(request.growth, "shift", None)
    if not isinstance(shift, float) or shift <= MOST_IN_16_BITS or ITEM_BYTES[request.source.dtype] >= 4:
        return []
    return [
        f"Warning: upcycling.shift {shift:g} leaves few of the bits of a {request.source.dtype_name} row for the "
        f"original's scores; use at most {MOST_IN_16_BITS:g}, or auto."
    ]


def architecture(checkpoint: CheckpointFiles) -> str:
    """The architecture that a checkpoint's config.json states, in short: Llama."""
    return short(checkpoint.config.architecture)


def written(request: Request) -> str:
    """The architecture as which the target is written, in short."""
    return short(carrying.target_architecture(request.source.config, request.model))


def short(name: str) -> str:
    """The architecture without what all of their names end in."""
    return name.removesuffix("ForCausalLM")


def _format(request: Request) -> list[str]:
    old, new = architecture(request.source), written(request)
    if old == new:
        return []
    heads, hidden = request.model.num_attention_heads, request.model.hidden_size
    if request.model.is_moe:
        why = "the format of transformers for these experts"
    else:
        why = f"the same network, whose {heads} heads do not divide the hidden size {hidden}, which {old} refuses"
    return [f"The source is a {old}, the target is written as a {new}: {why}."]


def _head(source: CheckpointFiles) -> list[str]:
    if source.model.tie_word_embeddings or not source.config.values.get("tie_word_embeddings"):
        return []
    return [
        f"The source's {hf_config.CONFIG_FILE} declares tie_word_embeddings, but {tensor_names.HEAD} differs from the "
        "embedding: it is read as untied, as transformers does."
    ]
