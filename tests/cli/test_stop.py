"""`action=stop` reaches the training of another process, and is refused where there is none."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aquilamoe.cli import watch
from aquilamoe.config import graph
from aquilamoe.config.messages import UserError
from aquilamoe.estimates.duration import Speed
from aquilamoe.pipeline import plan as planning
from aquilamoe.pipeline.attempts import Attempts
from aquilamoe.pipeline.cost import Rates
from aquilamoe.pipeline.store import Store


def test_the_stage_that_trains_gets_the_request_and_no_other(
    compose: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    store = Store(tmp_path)
    plan = {each.name: each for each in planning.make(graph.build(graph.parse(compose())), store, Speed(1e9))}
    with pytest.raises(UserError, match="no pipeline runs here"):
        watch.stop(store)
    with store.lock(), watch.announced(store, "one", list(plan.values())):
        with pytest.raises(UserError, match="no stage runs now"):
            watch.stop(store)
        for name, stops in (("corpus", False), ("dense", True)):
            (partial := store.partial(name, plan[name].fingerprint)).mkdir(parents=True)
            Attempts(store.root, plan[name].directory.name).begin(Rates(1, 0.0, 0.0))
            if not stops:
                with pytest.raises(UserError, match="stage corpus does not train"):
                    watch.stop(store)
                partial.rmdir()
        assert watch.stop(store).startswith("stage dense saves after its current step and ends")
    requests = [path.parent.name for path in store.stages.rglob("stop")]
    assert requests == [store.partial("dense", plan["dense"].fingerprint).name]
