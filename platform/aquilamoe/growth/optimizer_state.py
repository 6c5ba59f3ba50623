"""The optimizer's state through a growth, a tensor at a time: Adam's moments map as the gradient does (METHODS 4).

Where the gradient of a grown weight follows from that of the source (`growth.gradient_maps`), the first moment is
mapped like it and the second like its square. Elsewhere the first moment is zero, for the past does not constrain a
direction. The second one is only a scale, and stays: it is that of the weight whose place was taken, and for padding
the mean of its tensor. Zero would not do. Adam corrects its moments for a step that all of a tensor shares; at a late
one a first gradient would pass (1 - beta1) / sqrt(1 - beta2) times the learning rate, 3.2 with the usual betas of 0.9
and 0.999. Only a tensor that is new as a whole (a router) begins at step 0 with nothing, as at any start.

Muon's momentum is a first moment, and all that it has.

`grow_asymmetric` (SPARKLING, arXiv 2602.02472) begins both moments of new weights at zero all the same, so that copies
that are equal learn apart. Betas under which the first update would then be too large are refused with the experiment.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from aquilamoe.checkpoint import tensor_names
from aquilamoe.checkpoint.safetensors_header import SINGLE_FILE
from aquilamoe.checkpoint.writer import CheckpointWriter
from aquilamoe.config.growth import Growth
from aquilamoe.config.messages import UserError
from aquilamoe.config.schema import GrowthConfig, ModelConfig, UpcyclingConfig
from aquilamoe.growth import gradient_maps
from aquilamoe.growth.gradient_maps import Axis, GradientMap
from aquilamoe.growth.new_parts import new_parts
from aquilamoe.model.marks import Marks

STEP = "step"
FIRST = "exp_avg"
SECOND = "exp_avg_sq"
MOMENTUM = "momentum_buffer"  # of a hidden matrix, if the model was trained by Muon
ONE_FILE = 1 << 62  # bytes


def grow_moments(
    source: Path,
    target: Path,
    configs: tuple[ModelConfig, ModelConfig],
    growth: GrowthConfig | UpcyclingConfig,
    seed: int,
    *,
    progress: Callable[[int, int], None],
    asymmetric: bool = False,
) -> None:
    """Write the state of the optimizer of a grown model to the file `target`, out of that of its source.

    source: a safetensors file of `step`, `exp_avg` and `exp_avg_sq` of every parameter (of hidden matrices perhaps
        `momentum_buffer` instead), as training leaves it.
    configs: of the source and of the target. growth, seed: what the weights were grown by.
    progress: called with the number of tensors written, and of all tensors.
    asymmetric: whether new weights (`growth.new_parts`) begin with moments of zero, whatever the source has to give.
    In memory there is one tensor (of experts: one expert) of the source and its copy. UserError where the file is
    missing or damaged, or is not that of the source.
    """
    shapes = gradient_maps.parameter_shapes(configs[1])
    marks = new_parts([Growth(*configs, growth, seed)]) if asymmetric else {}
    workplace = target.parent / f".{target.name}"
    with _open(source) as file:
        muon = any(key.endswith(f"/{MOMENTUM}") for key in file.keys())  # noqa: SIM118 - it is no mapping
        _check(source, file, configs[0], muon)
        dtype = file.get_tensor(f"{next(iter(shapes))}/{FIRST}").dtype
        contents = {
            f"{name}/{key}": () if key == STEP else shape
            for name, shape in shapes.items()
            for key in _keys(name, shape, muon)
        }
        with CheckpointWriter(workplace, contents, dtype, max_shard_bytes=ONE_FILE) as writer:
            for done, (name, maps) in enumerate(gradient_maps.gradient_maps(*configs, growth, seed)):
                progress(done, len(shapes))
                for key in _keys(name, shapes[name], muon):
                    if key == STEP:
                        blocks: Iterable[Tensor] = [_step(file, maps)]
                    else:
                        blocks = _without_new(_blocks(file, maps, key, shapes[name], dtype), marks.get(name))
                    writer.write(f"{name}/{key}", blocks)
    (workplace / SINGLE_FILE).replace(target)
    workplace.rmdir()
    progress(len(shapes), len(shapes))


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise UserError(f"{path}: there is no optimizer state; set optimizer_state=reset")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: is damaged ({reason}); make it again, or set optimizer_state=reset") from error


def _keys(name: str, shape: tuple[int, ...], muon: bool) -> tuple[str, ...]:
    """The states of a parameter: Muon is for matrices from hidden units to hidden units."""
    layer, role = gradient_maps.split(name)
    is_hidden = layer is not None and len(shape) > 1 and role not in (tensor_names.ROUTER, tensor_names.SHARED_ROUTER)
    return (MOMENTUM,) if muon and is_hidden else (STEP, FIRST, SECOND)


def _check(path: Path, file: Any, config: ModelConfig, muon: bool) -> None:
    """Refuse the state of another model."""
    found = set(file.keys())
    for name, shape in gradient_maps.parameter_shapes(config).items():
        for key in _keys(name, shape, muon):
            full = f"{name}/{key}"
            expected = () if key == STEP else shape
            shown = tuple(file.get_slice(full).get_shape()) if full in found else "missing"
            if shown != expected:
                raise UserError(
                    f"{path}: '{full}' is {shown}, the model's is {expected}; take weights and optimizer state from "
                    "the same stage, or set optimizer_state=reset"
                )


def _step(file: Any, maps: list[GradientMap]) -> Tensor:
    return file.get_tensor(f"{maps[0].name}/{STEP}") if maps else torch.zeros(())


def _blocks(
    file: Any, maps: list[GradientMap], key: str, shape: tuple[int, ...], dtype: torch.dtype
) -> Iterator[Tensor]:
    """The rows of a moment: whole, or an expert at a time."""
    if not maps:
        yield from (torch.zeros(1, *shape[1:], dtype=dtype).expand(shape),)
    for gradient_map in maps:
        grown = _second(file, gradient_map) if key == SECOND else first(_read(file, gradient_map, key), gradient_map)
        yield grown[None] if len(shape) > grown.dim() else grown


def _without_new(blocks: Iterable[Tensor], marks: Marks | None) -> Iterator[Tensor]:
    """Blocks of a moment, zero where a weight is new: the whole tensor, or an expert at a time."""
    for index, block in enumerate(blocks):
        if marks is None:
            yield block
        else:
            first = slice(index, index + 1) if block.ndim > 2 else slice(0, len(block))
            place = (first, *(slice(0, size) for size in block.shape[1:]))
            yield block.masked_fill(marks.part(place), 0)


def _read(file: Any, gradient_map: GradientMap, key: str) -> Tensor:
    if gradient_map.expert is None:
        return file.get_tensor(f"{gradient_map.name}/{key}")
    return file.get_slice(f"{gradient_map.name}/{key}")[gradient_map.expert]


def _second(file: Any, gradient_map: GradientMap) -> Tensor:
    """The second moment; of experts with the deviation of fewer tokens."""
    squares = _read(file, gradient_map, SECOND)
    if gradient_map.spread != 1:
        # The square of the mean is passed on by the share, what is above it by more.
        mean = _read(file, gradient_map, FIRST).square()
        squares = torch.minimum(mean, squares) + gradient_map.spread * (squares - mean).clamp(min=0)
    return second(squares, gradient_map)


def first(moment: Tensor, gradient_map: GradientMap) -> Tensor:
    """Map a first moment, or a gradient; zero where it is unknown."""
    grown = _map(_map(moment, 0, gradient_map.rows, power=1), 1, gradient_map.columns, power=1)
    return grown * gradient_map.share if gradient_map.known else torch.zeros_like(grown)


def second(moment: Tensor, gradient_map: GradientMap) -> Tensor:
    """Map a second moment, or the square of a gradient; a scale where that is unknown."""
    return _map(_map(moment, 0, gradient_map.rows, power=2), 1, gradient_map.columns, power=2) * gradient_map.share**2


def _map(moment: Tensor, dim: int, axis: Axis, power: int) -> Tensor:
    def along(values: Tensor) -> Tensor:
        return values.view([-1 if d == dim else 1 for d in range(moment.dim())])

    if axis.index is not None:
        moment = moment.index_select(dim, axis.index)
    if axis.share is not None:
        moment = moment * along(axis.share**power).to(moment.dtype)
    if axis.unknown is not None and power == 1:
        moment = moment.masked_fill(along(axis.unknown), 0)
    if axis.padding:
        shape = [axis.padding if d == dim else size for d, size in enumerate(moment.shape)]
        is_zero = power == 1 or axis.unseen
        padding = moment.new_zeros(shape) if is_zero else moment.mean(dim, keepdim=True).expand(shape)
        moment = torch.cat([moment, padding], dim)
    return moment
