"""Becomes a command, with secrets from files in its environment: NAME_FILE=/run/secrets/x gives it NAME.

A container's own environment, which `docker inspect` shows, and all command lines have only the names of the files.
RAY_AUTH_TOKEN_PATH and the like need none of this: who reads a file by itself is given the file.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

FOLDER = Path("/run/secrets")


def with_secrets(environment: Mapping[str, str], folder: Path = FOLDER) -> dict[str, str]:
    """The environment with the contents of each file of `folder` that a variable *_FILE names.

    SystemExit with one line for a file that cannot be read, or is empty.
    """
    found = dict(environment)
    for name, path in environment.items():
        if not name.endswith("_FILE") or Path(path).parent != folder:
            continue
        try:
            secret = Path(path).read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            raise SystemExit(f"error: {name}: {path} cannot be read ({error}); see `secrets` of the service") from None
        if not secret:
            raise SystemExit(f"error: {name}: {path} is empty; set the secret in .env")
        found[name.removesuffix("_FILE")] = secret
        del found[name]
    return found


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit("error: no command; give one, e.g. `driver` of docker-compose.yml")
    os.execvpe(sys.argv[1], sys.argv[1:], with_secrets(os.environ))
