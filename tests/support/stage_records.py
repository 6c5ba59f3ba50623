"""Records as a runner writes them, for outputs that tests make by hand."""

from typing import Any

from aquilamoe.pipeline.records import Record

COMPLETE: dict[str, Any] = {
    "stage": "prepare",
    "kind": "pretrain",
    "fingerprint": "0123456789ab",
    "inputs": {},
    "metrics": {},
    "finished": "2026-01-01T00:00:00+00:00",
    "seconds": 1.0,
    "resumed": False,
}


def stage_record(**fields: Any) -> Record:
    """A record with everything that its readers need, and these fields."""
    record = {**COMPLETE, **fields}
    return {"recipe": {"kind": record["kind"], "version": 1, "config": {}, "inputs": {}}, **record}
