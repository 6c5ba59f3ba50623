"""Several checkpoints of one shape as one reader."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from aquilamoe.checkpoint import packed
from aquilamoe.checkpoint.reader import Reader


class Sources(Reader):
    """The tensors of checkpoints: of the first by their names, of further ones by `of_source`.

    Args:
        directories: of the checkpoints, at least one.

    Raises:
        UserError: as `Reader`, for each.
    """

    def __init__(self, directories: Sequence[Path]) -> None:
        super().__init__(directories[0])
        self.by_source = [self.tensors, *(packed.read(directory) for directory in directories[1:])]
        self.tensors = dict(self.tensors)
        for number, directory in enumerate(directories[1:], 1):
            for name, info in self.by_source[number].items():
                self.tensors[of_source(name, number)] = replace(info, file=str(directory.absolute() / info.file))


def of_source(name: str, number: int) -> str:
    """A tensor of one of several sources, which are counted from 0."""
    return f"{name} of source {number + 1}" if number else name
