"""A folder is a registry: `growth/methods/x.py` is all it takes for `x` to be a growth method."""

import importlib
from pathlib import Path
from types import ModuleType

from aquilamoe.config.messages import nearest

PACKAGE_ROOT = Path(__file__).resolve().parent.parent


def names(folder: str) -> list[str]:
    """The plugins in a folder of the package, e.g. `growth/methods`: the names of its modules."""
    return sorted(path.stem for path in (PACKAGE_ROOT / folder).glob("*.py") if not path.stem.startswith("_"))


def check(folder: str, name: str) -> str:
    """Return `name` if the folder has such a plugin; ValueError with the nearest name otherwise."""
    if name not in names(folder):
        raise ValueError(f"'{name}' is not in {folder}; {nearest(name, names(folder))}")
    return name


def load(folder: str, name: str) -> ModuleType:
    """Import the module of a plugin."""
    return importlib.import_module(".".join(["aquilamoe", *folder.split("/"), check(folder, name)]))
