"""Health check of a container: status 0 if every URL responds with 200 within three seconds, else 1 and one line."""

import sys
import urllib.request

TIMEOUT_S = 3.0


def check(url: str) -> str | None:
    """What is wrong, None if the URL responds with 200."""
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S):
            return None
    except (OSError, ValueError) as error:
        return f"{url}: {error}"


if __name__ == "__main__":
    raise SystemExit(next(filter(None, map(check, sys.argv[1:])), None))
