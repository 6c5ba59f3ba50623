"""How much a run of the tests tries: a part between two edits, everything in `make test-all`."""

import os


def examples(count: int) -> int:
    """How many of `count` examples of a property are tried: all of them with TEST_EFFORT=all, otherwise a quarter."""
    return count if os.environ.get("TEST_EFFORT") == "all" else -(-count // 4)
