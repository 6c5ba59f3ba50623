"""The type of every tensor of a target: as it was in the source, or as requested. Torch-free."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from aquilamoe.checkpoint import sharding, tensor_names
from aquilamoe.checkpoint.safetensors_header import DTYPE_NAMES, ITEM_BYTES, TensorInfo, main_dtype
from aquilamoe.config.grow import TargetDtype
from aquilamoe.config.messages import UserError
from aquilamoe.config.network import ModelConfig

SPELLED = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class DtypePolicy:
    """What types a growth writes.

    dtype: of all tensors; `source` keeps the type of each.
    keep_float32: whether norms and routers that are float32 in the source stay so, whatever dtype is.
    """

    dtype: TargetDtype = "source"
    keep_float32: bool = False


AS_SOURCE = DtypePolicy()


def of_target(
    tensors: Mapping[str, TensorInfo],
    models: tuple[ModelConfig, ModelConfig],
    layers: Sequence[int],
    dtype_policy: DtypePolicy = AS_SOURCE,
) -> dict[str, str]:
    """Decide the type of every tensor of a target.

    Args:
        tensors: of the source.
        models: of source and target.
        layers: of the source, for every layer of the target.
        dtype_policy: as requested.

    Returns:
        Types as safetensors spells them, by name; what the source has no like of is in the type of most of it.
    """
    main, target = main_dtype(tensors), models[1]
    found: dict[str, str] = {}
    for name, role, origin in _origins(models, layers):
        own = tensors[origin].dtype if origin in tensors else main
        is_kept = dtype_policy.keep_float32 and own == "F32" and is_norm_or_router(role)
        found[name] = own if dtype_policy.dtype == "source" or is_kept else SPELLED[dtype_policy.dtype]
    assert found.keys() == tensor_names.tensor_shapes(target).keys()
    _check_joined(found, target)
    return found


def _check_joined(types: Mapping[str, str], target: ModelConfig) -> None:
    """UserError for parts of one tensor that the source has in several types."""
    for name, tensor in tensor_names.joined(target).items():
        kinds = sorted({DTYPE_NAMES[types[part]] for part in tensor.parts})
        if len(kinds) > 1:
            raise UserError(
                f"dtype: source, but parts of the target's '{name}' are {' and '.join(kinds)} there; use "
                f"dtype={kinds[-1]}"
            )


def stated(types: Mapping[str, str], shapes: sharding.Shapes) -> str:
    """The type that config.json states, e.g. `bfloat16`: that of most of the weights, by bytes."""
    counted: Counter[str] = Counter()
    for name, shape in shapes.items():
        counted[types[name]] += sharding.num_bytes(shape, types[name])
    return DTYPE_NAMES[max(counted, key=lambda dtype: (counted[dtype], ITEM_BYTES[dtype]))]


def is_norm_or_router(role: str) -> bool:
    """Whether a tensor is one of the few whose rounding matters most."""
    return role.endswith("norm.weight") or role in (tensor_names.ROUTER, tensor_names.SHARED_ROUTER)


def _origins(models: tuple[ModelConfig, ModelConfig], layers: Sequence[int]) -> Iterator[tuple[str, str, str]]:
    """Every tensor of the target by name and role, and the name of the source's tensor that it is made of."""
    source, target = models
    for name in tensor_names.outer_shapes(target):
        yield name, name, name
    for layer, origin in enumerate(layers):
        known = tensor_names.layer_names(source, origin)
        for role, name in tensor_names.layer_names(target, layer).items():
            made_of = role if role in known else tensor_names.dense_role(role)
            yield name, role, known.get(made_of, "")
