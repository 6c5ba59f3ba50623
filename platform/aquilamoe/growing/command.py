"""What `action=run`, `plan` and `certify` do with one growth of one checkpoint."""

import json
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from aquilamoe.config import growing
from aquilamoe.config.growing import GrowConfig
from aquilamoe.config.messages import UserError
from aquilamoe.growing import comparison, held_out, identity, output, plan, screen
from aquilamoe.growing.comparison import Claim
from aquilamoe.growing.making import Making
from aquilamoe.growing.output import Output
from aquilamoe.growing.request import Request, directory, open_checkpoint, resolve
from aquilamoe.reports import rows
from aquilamoe.terminal.screen import console

if TYPE_CHECKING:
    from rich.console import Console


def execute(values: Mapping[str, Any], command: str) -> None:
    """Validate a composed configuration and do its action; UserError for anything that the user can repair.

    command: what the user typed, for the model card.
    """
    config = growing.parse(values)
    if config.as_json and config.action != "plan":
        raise UserError(f"json: action={config.action} has no JSON document; action=plan has one")
    if config.action == "certify":
        out = console()
        certificate = certify(config, out)
        out.print()
        screen.show_certificate(out, certificate)
    elif config.action == "plan":
        _plan(resolve(config), config)
    else:
        _run(resolve(config), config, command)


def _plan(request: Request, config: GrowConfig) -> None:
    if config.as_json:
        print(json.dumps(plan.document(request, config.disk_bytes_per_s), indent=1))
        return
    record = output.published(request.target)
    state = "the target exists, made by this tool: a run compares the recipes" if record else "the target is new"
    tolerance = comparison.tolerance(request.source, config.certificate, request.growth)
    screen.show_plan(console(), request, config, state, tolerance)


def certify(config: GrowConfig, out: "Console") -> dict[str, Any]:
    """Compare two checkpoints as they are; one by this tool is held to what its record claims."""
    source = open_checkpoint("source", directory("source", config.source))
    target = open_checkpoint("target", directory("target", config.target))
    text = held_out.read(source.directory, source.model, config.certificate, config.seed)
    screen.show_comparison(out, source, target)
    record = output.record(target.directory)
    claim = Claim.of_record(record) if record else Claim(config.certificate.tolerance is not None)
    return comparison.compare(out, source, target, text, config.certificate, claim)


def make(request: Request, config: GrowConfig, command: str, out: "Console") -> Mapping[str, Any]:
    """Grow, certify and publish; return the target's record. A target that is complete is served as it is."""
    cached = _cached(out, request)
    if cached is not None:
        return cached
    with output.locked(request.target) as place:
        # Another run may have finished it meanwhile, or was killed between the record and the name.
        cached = _cached(out, request) or _finished(out, request, place)
        if cached is None:
            Making(out, request, config, command, place).run()
    published = cached or output.record(request.target)
    assert published is not None
    return published


def _run(request: Request, config: GrowConfig, command: str) -> None:
    out, began = console(), time.monotonic()
    record = make(request, config, command, out)
    out.print()
    screen.show_result(out, request, record)
    seconds = rows.duration(time.monotonic() - began)
    out.print(f"\nDone in {seconds}: {screen.relative(request.target)}", soft_wrap=True)


def _cached(out: "Console", request: Request) -> dict[str, Any] | None:
    record = output.published(request.target)
    if record is None:
        return None
    identity.check_same(request.target, request, record)
    _say_cached(out, request)
    return record


def _finished(out: "Console", request: Request, place: Output) -> dict[str, Any] | None:
    record = place.finished()
    if record is None or identity.changes(request, record):
        return None
    place.rename()
    _say_cached(out, request)
    return record


def _say_cached(out: "Console", request: Request) -> None:
    out.print(f"cached: {screen.relative(request.target)} is complete, by this very recipe")
