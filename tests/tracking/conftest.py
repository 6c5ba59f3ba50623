import pytest

from aquilamoe.tracking import connection, observer
from waiting import PATIENCE_S


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is sent at the end of a pipeline gets there, and no server counts as slow, however busy the machine is."""
    monkeypatch.setattr(observer, "FLUSH_S", PATIENCE_S)
    monkeypatch.setattr(connection, "PROMPT_S", PATIENCE_S)
