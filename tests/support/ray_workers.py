"""What Ray knows of the training workers of the session that this process is connected to."""

from collections.abc import Mapping
from typing import Any


def started() -> list[dict[str, Any]]:
    """Every one, dead ones included; none without a session."""
    import ray
    from ray._private.state import state as known

    if not ray.is_initialized():
        return []
    actors: Mapping[str, dict[str, Any]] = known.actor_table(None)
    return [actor for actor in actors.values() if actor["ActorClassName"].endswith("RayTrainWorker")]


def alive() -> list[dict[str, Any]]:
    """Those that live."""
    return [actor for actor in started() if actor["State"] == "ALIVE"]
