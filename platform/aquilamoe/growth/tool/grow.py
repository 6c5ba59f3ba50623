"""One growth of one checkpoint, and its certificate: what the command and the Python API do."""

from collections.abc import Mapping
from typing import Any

from aquilamoe.config.grow import GrowConfig
from aquilamoe.growth.tool import comparison, held_out, identity, output
from aquilamoe.growth.tool.making import Making
from aquilamoe.growth.tool.output import TargetFolder
from aquilamoe.growth.tool.reporter import Reporter
from aquilamoe.growth.tool.request import Request, directory, open_checkpoint, source_directory


def certify(config: GrowConfig, reporter: Reporter) -> dict[str, Any]:
    """Compare two checkpoints as they are; one by this tool is held to what its record claims."""
    source = open_checkpoint("source", source_directory(config))
    target = open_checkpoint("target", directory("target", config.target))
    record = output.record(target.directory)
    claim = comparison.existing(source, target, record, config.certificate)
    settings = comparison.settings_for(claim.growth, config.certificate)
    text = held_out.read(source.directory, source.model, settings, config.seed)
    reporter.comparing(source, target)
    return comparison.compare(reporter, source, target, text=text, claim=claim)


def make(request: Request, config: GrowConfig, command: str, reporter: Reporter) -> Mapping[str, Any]:
    """Grow, certify and publish; return the target's record. A target that is complete is served as it is."""
    cached = _cached(reporter, request)
    if cached is not None:
        return cached
    with output.locked(request.target) as place:
        # Another run may have finished it meanwhile, or was killed between the record and the name.
        cached = _cached(reporter, request) or _finished(reporter, request, place)
        if cached is None:
            Making(reporter, request, config, command, place).run()
    published = cached or output.record(request.target)
    assert published is not None
    return published


def _cached(reporter: Reporter, request: Request) -> dict[str, Any] | None:
    record = output.published(request.target)
    if record is None:
        return None
    identity.check_same(request.target, request, record)
    reporter.cached(request.target)
    return record


def _finished(reporter: Reporter, request: Request, place: TargetFolder) -> dict[str, Any] | None:
    record = place.finished()
    if record is None or identity.changes(request, record):
        return None
    place.rename()
    reporter.cached(request.target)
    return record
