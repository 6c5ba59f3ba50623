"""JSON files of a checkpoint, read within bounds: they are of anybody's making, and of any size and depth."""

import json
from pathlib import Path
from typing import Any

from aquilamoe.checkpoint import links
from aquilamoe.config.messages import UserError

# A config.json has kilobytes; the index of the largest models some megabytes.
MAX_CONFIG_BYTES = 4 * 2**20
MAX_INDEX_BYTES = 64 * 2**20


def read(path: Path, checkpoint: Path, max_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """The object in a JSON file of the directory `checkpoint`; UserError unless it is one."""
    links.check(path, checkpoint)
    if not path.is_file():
        raise UserError(f"{path}: no such file; name a directory with a Hugging Face checkpoint")
    size = path.stat().st_size
    if size > max_bytes:
        raise UserError(f"{path}: has {size / 1e6:.3g} MB, at most {max_bytes / 1e6:.3g} MB are read; copy it again")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise UserError(f"{path}: is not JSON ({reason}); copy it again") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); make it readable") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds {type(values).__name__}, not an object; copy it again")
    return values
