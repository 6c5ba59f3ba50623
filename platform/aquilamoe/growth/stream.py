"""A checkpoint in, a grown checkpoint out, without either ever being in memory as a whole."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from aquilamoe.checkpoint import carrying, companions, fit, hf_config
from aquilamoe.checkpoint import reader as reading
from aquilamoe.checkpoint import tensor_names as names
from aquilamoe.checkpoint.allocator import keep_large_buffers
from aquilamoe.checkpoint.dtypes import cast, check_finite, check_representable, torch_dtype
from aquilamoe.checkpoint.hf_config import CheckpointConfig
from aquilamoe.checkpoint.sources import Sources
from aquilamoe.config.messages import UserError
from aquilamoe.config.schema import ModelConfig
from aquilamoe.growth import dtypes
from aquilamoe.growth.lazy_tensor import LazyTensor, block_slices

if TYPE_CHECKING:
    from torch import Tensor

Progress = Callable[[int, int], None]  # (tensors written, tensors of the target)
FILLER = "zeros: the format requires it"


@dataclass(frozen=True)
class Recipe:
    """What becomes of `rows`: the tensors of the target that they are, by on-disk names."""

    names: Sequence[str]
    rows: LazyTensor


def silent(done: int, total: int) -> None:
    """Progress that is not reported."""


def rewrite(
    source: Path,
    target: Path,
    configs: tuple[CheckpointConfig, ModelConfig],
    *,
    layers: Sequence[int],
    grow: Callable[[reading.Reader], Iterable[Recipe]],
    progress: Progress,
    dtype_policy: dtypes.DtypePolicy = dtypes.AS_SOURCE,
    others: Sequence[Path] = (),
) -> dict[str, str]:
    """Write to `target` what `grow` makes of the weights of `source`; then config and tokenizer.

    configs: of the source and of the target. layers: of the source, for every layer of the target.
    dtype_policy: the types of the target's tensors. others: further checkpoints of the source's shape.
    Returns the SHA-256 of every tensor. Bytes that stay what they are go from file to file; everything else is
    computed on as many threads as torch has, a block of rows at a time, and does not depend on their number. Where
    nothing has to be, torch is not imported.
    Raises UserError when the source's weights do not match its config.json or are not finite, when a tensor of the
    target would not be, when the disk is too small, or source and target are the same.
    """
    source_config, target_config = configs
    if target.resolve() in [directory.resolve() for directory in (source, *others)]:
        raise UserError(f"{target}: is source and target at once, 2 directories are needed; choose another target")
    shapes = names.tensor_shapes(target_config)
    companions.companions(source)  # refuses links out of the checkpoint
    with Sources([source, *others]) as reader:
        for directory, tensors in zip((source, *others), reader.by_source, strict=True):
            fit.check(directory, source_config.model, tensors)
        fit.check_fillers(reader, source_config.model)
        types = dtypes.of_target(reader.by_source[0], (source_config.model, target_config), layers, dtype_policy)
        values = carrying.carried(source_config, target_config, layers, dtypes.stated(types, shapes))
        recipes = list(grow(reader))
        with reading.CheckpointWriter(target, shapes, types, joined=names.joined(target_config)) as writer:
            _write(recipes, reader, writer, types, lambda done: progress(done, len(shapes)))
    hf_config.write_json(target / hf_config.CONFIG_FILE, values)
    companions.copy_companions(source, target)
    return {name: writer.digests[name] for name in shapes}


def compute_dtype(reader: reading.Reader) -> str:
    """Sums of weights are taken in float32 or wider (F32, F64), and rounded once, when they are written."""
    return "F64" if reader.info(names.EMBEDDING).dtype == "F64" else "F32"


def _write(
    recipes: Sequence[Recipe],
    reader: reading.Reader,
    writer: reading.CheckpointWriter,
    types: Mapping[str, str],
    report: Callable[[int], None],
) -> None:
    done = 0
    report(done)
    due = [recipe for recipe in recipes if _is_computed(recipe, reader, types)]
    with _computed(due, types) as blocks:
        for recipe, following in zip(recipes, [*recipes[1:], None], strict=True):
            if recipe.rows.copies is not None and not _is_computed(recipe, reader, types):
                writer.copy(recipe.names, reader, recipe.rows.copies)
            elif recipe.rows.make is not None:
                values = recipe.rows.make()
                check_representable(values, types[recipe.names[0]], recipe.names[0])
                writer.write(recipe.names, [values])
            else:
                writer.write(recipe.names, islice(blocks, len(list(block_slices(recipe.rows.shape)))))
            # What was read stays in memory until it is released; the next tensor often is of the same source.
            for name in recipe.rows.sources - (following.rows.sources if following else frozenset()):
                reader.release(name)
            for _ in recipe.names:
                done += 1
                report(done)


def _is_computed(recipe: Recipe, reader: reading.Reader, types: Mapping[str, str]) -> bool:
    """Whether the tensor has to be made: what is copied in its type is not."""
    copied = recipe.rows.copies
    is_copy = copied is not None and reader.info(copied).dtype == types[recipe.names[0]]
    return not is_copy and recipe.rows.make is None


@contextmanager
def _computed(recipes: Sequence[Recipe], types: Mapping[str, str]) -> Iterator[Iterator[Tensor]]:
    """The blocks of tensors that have to be computed, in order; a few are in the making before they are due."""
    if not recipes:
        yield iter(())
        return
    import torch

    threads = torch.get_num_threads()
    keep_large_buffers()
    tasks = ((recipe, index) for recipe in recipes for index in block_slices(recipe.rows.shape))
    # Blocks are computed side by side: a thread more for each operation would be in the way.
    with ThreadPoolExecutor(threads, "growing", torch.set_num_threads, (1,)) as pool:

        def compute(recipe: Recipe, index: slice) -> Tensor:
            with torch.inference_mode():
                block, name = recipe.rows[index], recipe.names[0]
                elements = cast(block, torch_dtype(types[name]), name)
                check_finite(elements, block, name)
                return elements

        def take() -> Iterator[Tensor]:
            due: deque[Future[Tensor]] = deque(pool.submit(compute, *task) for task in islice(tasks, 2 * threads))
            while due:
                block = due.popleft().result()
                due.extend(pool.submit(compute, *task) for task in islice(tasks, 1))
                yield block
                del block

        try:
            yield take()
        finally:
            pool.shutdown(cancel_futures=True)
