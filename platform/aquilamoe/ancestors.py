"""Everything that something was made from, for any kind of object and any source of its parents."""

from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)


def ancestors(key: Key, parents: Callable[[Key], Iterable[Key]]) -> list[Key]:
    """All that leads to `key`, each once, nearest first; itself not."""
    found = {key: None}
    waiting = [key]
    for each in waiting:
        new = [parent for parent in parents(each) if parent not in found]
        found.update(dict.fromkeys(new))
        waiting += dict.fromkeys(new)
    return list(found)[1:]
