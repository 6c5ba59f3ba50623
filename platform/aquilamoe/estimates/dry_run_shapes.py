"""Every tensor of every model and of every growth, at full size and without its values."""

from math import prod
from typing import TYPE_CHECKING, Any, cast

import torch

from aquilamoe.checkpoint import tensor_names
from aquilamoe.checkpoint.sources import of_source
from aquilamoe.checkpoint.state_dict import on_disk
from aquilamoe.config.graph import Node
from aquilamoe.config.messages import UserError
from aquilamoe.config.network import ModelConfig
from aquilamoe.config.schema import GrowthStage, ScaleOutStage, ScaleUpStage
from aquilamoe.growth import mix, rules, scale_out, scale_up
from aquilamoe.model.transformer import Decoder

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aquilamoe.checkpoint.reader import Reader
    from aquilamoe.growth.stream import Recipe


def check_model(node: Node) -> int:
    """Build a stage's network on the meta device and compare it with its files; return how many tensors it has.

    UserError for a tensor of another shape than its file's, and for parameters that are not those of the plan.
    """
    config = node.model
    assert config is not None
    with torch.device("meta"):
        network = Decoder(config)
    files = tensor_names.tensor_shapes(config)
    parameters = dict(network.named_parameters())
    for name, in_files in on_disk(config).items():
        shape = tuple(parameters[name].shape)
        of_file = shape[1:] if len(shape) == 3 else shape
        for file_name in in_files:
            _check_shape(node, file_name, of_file, files[file_name])
    found = sum(parameter.numel() for parameter in parameters.values())
    if found != config.num_params:
        raise UserError(
            f"stages.{node.name}: the network has {found:,} parameters, the plan counts {config.num_params:,}; "
            "this is a bug in the platform, please report it with the configuration"
        )
    return len(parameters)


def check_growth(node: Node) -> int:
    """Grow a source that is not there: the shape of every tensor of the target, and the last of its rows.

    The rows are computed by the growth itself, from a source that is zero everywhere and takes no memory. Returns how
    many tensors were made. UserError for one of a wrong shape, for one that is missing, and for one that is made twice.
    """
    assert node.model is not None and node.source_model is not None
    expected, made = tensor_names.tensor_shapes(node.model), set()
    for recipe in _recipes(node, node.source_model, node.model):
        for name in recipe.names:
            if name in made or name not in expected:
                raise _mistake(node, f"{name} is made {'twice' if name in made else 'and the target has none'}")
            made.add(name)
            _check_shape(node, name, recipe.rows.shape, expected[name])
        if not recipe.rows.is_random:  # noise needs the size of all values, which here are none
            size = recipe.rows.shape[0]
            row = tuple(recipe.rows[slice(size - 1, size)].shape)
            _check_shape(node, f"the last row of {recipe.names[0]}", row, (1, *recipe.rows.shape[1:]))
    if missing := expected.keys() - made:
        raise _mistake(node, f"{min(missing)} is not made")
    return len(made)


def _recipes(node: Node, source: ModelConfig, target: ModelConfig) -> "Iterator[Recipe]":
    stage, reader = cast(GrowthStage, node.stage), cast("Reader", _Absent(source, 1 + len(node.other_models)))
    if isinstance(stage, ScaleUpStage):
        rules.check(source, target, stage.growth)
        return scale_up.recipes(reader, source, target, stage.growth, stage.seed)
    assert isinstance(stage, ScaleOutStage)
    rules.check(source, target, stage.upcycling)
    if node.other_models:
        return mix.recipes(reader, source, target, stage.upcycling, stage.seed)
    return scale_out.recipes(reader, source, target, stage.upcycling, stage.seed)


class _Absent:
    """Reads a checkpoint that is not there: zeros of the right shapes, one number in memory for each tensor."""

    def __init__(self, config: ModelConfig, count: int = 1) -> None:
        shapes = tensor_names.tensor_shapes(config).items()
        self._shapes = {of_source(name, number): shape for name, shape in shapes for number in range(count)}

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def info(self, name: str) -> Any:
        return _Info(prod(self._shapes[name]) * 4)

    def get(self, name: str) -> torch.Tensor:
        return torch.zeros(()).expand(self._shapes[name])

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return torch.zeros(()).expand(stop - start, *self._shapes[name][1:])

    def check(self, *_: Any) -> None:
        """Zeros are finite."""


class _Info:
    def __init__(self, num_bytes: int) -> None:
        self.dtype, self.num_bytes = "F32", num_bytes


def _check_shape(node: Node, name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if tuple(shape) != tuple(expected):
        raise _mistake(node, f"{name} has shape {tuple(shape)}, the target's is {tuple(expected)}")


def _mistake(node: Node, what: str) -> UserError:
    return UserError(f"stages.{node.name}: {what}; see the growth method, or report it with the configuration")
