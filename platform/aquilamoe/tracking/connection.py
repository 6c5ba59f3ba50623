"""Where MLflow is, whether it responds, and how to talk to it without noise."""

import logging
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from aquilamoe.config.messages import UserError
from aquilamoe.config.passwords import encoded, login, without_passwords
from aquilamoe.config.tracking import check_tracking
from aquilamoe.tracking.database import NAME, Repairs, database_file, database_uri, open_file, prepare

PROBE_S = 30.0  # how long a server may take for a sign of life
PROMPT_S = 2.0  # a server that once took longer to respond is slow
# Few attempts, as whatever could not be sent is sent later; and silent. Set before MLflow is imported.
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}


class LatencyMonitor:
    """How long a server takes to respond: only a thread of its own waits for it, but at the end of a pipeline."""

    def __init__(self) -> None:
        self._slowest_s = 0.0
        self._since: float | None = None  # when the call began that has no response yet

    @contextmanager
    def call(self) -> Iterator[None]:
        """Around a call to the server."""
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._slowest_s = max(self._slowest_s, time.monotonic() - self._since)
            self._since = None

    @property
    def is_slow(self) -> bool:
        since = self._since
        waiting_s = time.monotonic() - since if since is not None else 0.0
        return max(self._slowest_s, waiting_s) > PROMPT_S


class WatchedClient:
    """An MlflowClient whose calls are watched."""

    def __init__(self, client: Any, watch: LatencyMonitor) -> None:
        self._client, self._watch = client, watch

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(self._client, name)

        def call(*arguments: Any, **keywords: Any) -> Any:
            with self._watch.call():
                return function(*arguments, **keywords)

        return call


def tracking_uri(uri: str | None, root: Path) -> str:
    """The URI itself, or that of the database in `root`; UserError for anything that MLflow does not take."""
    if uri is None:
        return database_uri((root / NAME).absolute())
    try:
        check_tracking(uri)
    except ValueError as error:
        raise UserError(f"tracking.uri: {error}") from None
    return encoded(uri)


def shown(uri: str) -> str:
    """A URI for people, without a user and a password."""
    scheme, _, rest = login(uri)
    kind = "server" if scheme in ("http://", "https://") else "database"
    return without_passwords(f"{kind} {scheme}{rest}")


def is_reachable(uri: str) -> bool:
    """Whether anything responds over HTTP, even with an error; databases are not queried."""
    if not uri.startswith(("http://", "https://")):
        return True
    import ssl
    from urllib.error import HTTPError
    from urllib.request import urlopen

    scheme, _, rest = login(uri)
    place = re.split(r"[?#]", rest, maxsplit=1)[0].rstrip("/")
    try:
        urlopen(f"{scheme}{place}/health", timeout=PROBE_S).close()
    except HTTPError as error:
        error.close()
        return error.code not in (502, 503, 504)
    except OSError as error:
        return isinstance(getattr(error, "reason", None), ssl.SSLError)
    except ValueError:  # `http://[`, a port that is not a number, ...
        return False
    return True


def is_away(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is a missing response: MLflow wraps those of the network."""
    while error is not None:
        unanswered = type(error).__module__.startswith("requests") and getattr(error, "response", None) is None
        if unanswered or isinstance(error, (ConnectionError, TimeoutError)):
            return True
        error = error.__cause__ or error.__context__
    return False


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without passwords, for a note on what could not be sent."""
    return next(iter(without_passwords(str(error)).splitlines()), type(error).__name__)[:200]


def connect(uri: str, watch: LatencyMonitor | None = None, repairs: Repairs | None = None) -> Any:
    """An MlflowClient, watched if it talks to a server.

    Imports MLflow (1-4 s) and, the first time, makes the tables of a SQLite database (1-3 s).
    repairs: is given a line about a database that had to be replaced.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # MLflow's tables use a loader that SQLAlchemy 2.1 deprecates.
    warnings.filterwarnings("ignore", "The ``noload`` loader strategy", DeprecationWarning)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # what was not sent is reported at the end
    from mlflow import MlflowClient

    path = database_file(uri)
    if path is not None:
        if (replaced := prepare(path)) and repairs:
            repairs.replaced.append(replaced)
        # Readers - the UI - and this writer then do not block each other; the database remembers.
        with closing(open_file(path, "rw")) as database:
            database.execute("PRAGMA journal_mode=wal")
    client = MlflowClient(uri)
    return WatchedClient(client, watch) if watch is not None and path is None else client
