from collections.abc import Iterator

import pytest

from aquilamoe.tracking import connection, observer
from waiting import PATIENCE_S


@pytest.fixture(autouse=True, scope="module")
def _patience() -> Iterator[None]:
    """What is sent at the end of a pipeline gets there, and no server counts as slow, however busy the machine is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(observer, "FLUSH_S", PATIENCE_S)
        patch.setattr(connection, "PROMPT_S", PATIENCE_S)
        yield
