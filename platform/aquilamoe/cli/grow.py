"""What `action=run`, `plan` and `certify` do with one growth of one checkpoint."""

import json
import time
from collections.abc import Mapping
from typing import Any

from aquilamoe import format
from aquilamoe.checkpoint import hub
from aquilamoe.cli import grow_view
from aquilamoe.cli.console import console
from aquilamoe.config import grow
from aquilamoe.config.grow import GrowConfig
from aquilamoe.config.messages import UserError
from aquilamoe.config.paths import shown
from aquilamoe.growth.tool import comparison, output, plan
from aquilamoe.growth.tool.grow import certify, make
from aquilamoe.growth.tool.request import Request, resolve
from aquilamoe.pipeline.store import RECORD


def execute(values: Mapping[str, Any], command: str) -> None:
    """Validate a composed configuration and do its action; UserError for anything that the user can repair.

    command: what the user typed, for the model card.
    """
    config = grow.parse(values)
    if config.as_json and config.action != "plan":
        raise UserError(f"json: action={config.action} has no JSON document; action=plan has one")
    if config.action == "certify":
        out = console()
        certificate = certify(config, grow_view.TerminalReporter(out))
        out.print()
        grow_view.show_certificate(out, certificate)
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
    tolerance = comparison.tolerance(request.source, config.certificate, comparison.known(request.growth))
    grow_view.show_plan(console(), request, config, state, tolerance)


def _push(out: Any, request: Request, record: Mapping[str, Any], name: str) -> None:
    """Publish the target: weights, config.json, tokenizer, card and record."""
    address = hub.push("push", request.target, name, [*record["files"], RECORD])
    out.print(f"\npublished  {address}", soft_wrap=True)


def _run(request: Request, config: GrowConfig, command: str) -> None:
    out, began = console(), time.monotonic()
    record = make(request, config, command, grow_view.TerminalReporter(out))
    out.print()
    grow_view.show_result(out, request, record)
    if config.push is not None:
        _push(out, request, record, config.push)
    seconds = format.duration(time.monotonic() - began)
    out.print(f"\nDone in {seconds}: {shown(request.target)}", soft_wrap=True)
