"""What `action=run`, `plan` and `certify` do with one growth of one checkpoint."""

import json
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from threading import Event
from typing import TYPE_CHECKING, Any

from aquilamoe import terminal
from aquilamoe.config import growing
from aquilamoe.config.growing import GrowConfig
from aquilamoe.config.messages import UserError
from aquilamoe.growing import card, held_out, identity, output, plan, screen
from aquilamoe.growing.output import Output
from aquilamoe.growing.request import Checkpoint, Request, directory, open_checkpoint, resolve
from aquilamoe.pipeline.store import write_atomically

if TYPE_CHECKING:
    from rich.console import Console

# Card, record, tokenizer and what file systems keep for themselves.
SLACK_BYTES = 64 * 10**6
TOLERANCES = {"F64": 1e-6, "F32": 1e-3, "F16": 0.05, "BF16": 0.5}
STARTS_ANEW = "nothing is left behind; the same command starts anew"
CONTINUES = "the weights are kept beside the target; the same command continues with the certificate"


def execute(values: Mapping[str, Any], command: str) -> None:
    """Validate a composed configuration and do its action; UserError for anything that the user can repair.

    command: what the user typed, for the model card.
    """
    config = growing.parse(values)
    if config.action == "certify":
        _certify(config)
        return
    request = resolve(config)
    if config.action == "plan":
        _plan(request, config)
    else:
        _run(request, config, command)


def _plan(request: Request, config: GrowConfig) -> None:
    record = output.published(request.target)
    state = "the target exists, made by this tool: a run compares the recipes" if record else "the target is new"
    screen.show_plan(terminal.console(), request, config, state, _tolerance(config, request.source))


def _tolerance(config: GrowConfig, source: Checkpoint) -> float:
    return config.certificate.tolerance or TOLERANCES[source.dtype]


def _certify(config: GrowConfig) -> None:
    """Compare two checkpoints as they are; one by this tool is held to what its record claims."""
    source = open_checkpoint("source", directory("source", config.source))
    target = open_checkpoint("target", directory("target", config.target))
    out = terminal.console()
    screen.show_comparison(out, source, target)
    record = output.record(target.directory)
    claims = config.certificate.tolerance is not None or bool(record and record.get("preserving"))
    certificate = _compare(out, source, target, config, claims)
    out.print()
    screen.show_certificate(out, certificate)


def _compare(
    out: "Console", source: Checkpoint, target: Checkpoint, config: GrowConfig, claims: bool
) -> dict[str, Any]:
    """The certificate of two checkpoints, with the text that it was made on."""
    if target.model.vocab_size < source.model.vocab_size:
        raise UserError(
            f"{target.directory}: vocab_size {target.model.vocab_size} is smaller than the source's "
            f"{source.model.vocab_size}; compare checkpoints of one tokenizer"
        )
    text = held_out.read(source.directory, source.model, config.certificate, config.seed)
    import torch

    from aquilamoe.growth.certificate import certify

    with screen.bar(out, "certificate", "layers") as bar:
        found: dict[str, Any] = certify(
            source.directory,
            target.directory,
            torch.from_numpy(text.tokens_bt),
            claims,
            _tolerance(config, source),
        )
        bar.say(f"{found['tokens']:,} tokens in {terminal.duration(bar.seconds)}")
    return {**found, "text": text.text}


def _run(request: Request, config: GrowConfig, command: str) -> None:
    out = terminal.console()
    if _is_cached(out, request):
        return
    with output.locked(request.target) as place:
        if _is_cached(out, request):  # another run may have finished it meanwhile
            return
        if (record := place.finished()) is not None and _is_same(place, request, record):
            place.rename()
            _show_cached(out, request, record)
            return
        _make(out, request, config, command, place)


def _is_cached(out: "Console", request: Request) -> bool:
    record = output.published(request.target)
    if record is None:
        return False
    identity.check_same(request.target, request, record)
    _show_cached(out, request, record)
    return True


def _show_cached(out: "Console", request: Request, record: Mapping[str, Any]) -> None:
    out.print(f"cached: {screen.relative(request.target)} is complete, by this very recipe\n")
    screen.show_result(out, request, record)


def _is_same(place: Output, request: Request, record: Mapping[str, Any]) -> bool:
    try:
        identity.check_same(place.partial, request, record)
    except UserError:
        return False
    return True


@dataclass
class _Step:
    """Seconds of the parts of a run; never part of what a target is."""

    grow_s: float = 0.0
    certificate_s: float = 0.0


def _make(out: "Console", request: Request, config: GrowConfig, command: str, place: Output) -> None:
    """Grow, certify, publish. What fails leaves nothing; what is interrupted after the growth is kept."""
    started, spent = time.time(), _Step()
    interrupted = STARTS_ANEW
    keep = False
    try:
        with output.full_disk(request.target):
            note = place.grown()
            if note is None or not _is_same(place, request, note):
                place.discard()
                note = _grow(out, request, place, spent)
            else:
                screen.Bar(out, "grow", "bytes").say("done by an earlier run, which was cut off")
            interrupted, keep = CONTINUES, True
            record = _record(out, request, config, place, note, spent)
            text = card.render(request, config, command, record, record["recipe"]["inputs"]["source"])
            (place.partial / card.CARD).write_text(text, encoding="utf-8")
            run = {"started": started, "seconds": time.time() - started, **vars(spent)}
            write_atomically(place.partial / output.RUN, json.dumps(run, indent=1) + "\n")
            place.publish(record)
    except KeyboardInterrupt:
        if not keep:
            place.discard()
        raise KeyboardInterrupt(interrupted) from None
    except BaseException:
        place.discard()
        raise
    out.print()
    screen.show_result(out, request, record)
    out.print(
        f"\nDone in {terminal.duration(time.time() - started)}: {screen.relative(request.target)}", soft_wrap=True
    )


def _grow(out: "Console", request: Request, place: Output, spent: _Step) -> dict[str, Any]:
    """Write all tensors of the target; return what is known of them. The source's files are hashed meanwhile."""
    place.check_space(plan.target_bytes(request) + SLACK_BYTES)
    stop = Event()
    with ThreadPoolExecutor(max_workers=1) as aside:
        digests = aside.submit(identity.digests, identity.source_files(request), stop)
        try:
            tensors = _grow_tensors(out, request, place, spent)
            note = {"recipe": identity.recipe(request, digests.result()), "tensors": tensors}
        except BaseException:
            stop.set()
            raise
    place.note_grown(note)
    return note


def _grow_tensors(out: "Console", request: Request, place: Output, spent: _Step) -> dict[str, str]:
    """SHA-256 of every tensor that the engine wrote."""
    from aquilamoe.growth.scale_out import scale_out
    from aquilamoe.growth.scale_up import scale_up

    grow: Any = scale_up if request.kind == "scale_up" else scale_out
    with screen.bar(out, "grow", "bytes") as bar:
        tensors = grow(request.source.directory, place.partial, request.model, request.growth, request.seed, bar.update)
        spent.grow_s = bar.seconds
        written = plan.target_bytes(request)
        rate = terminal.size(int(written / max(bar.seconds, 1e-3)))
        bar.say(f"{terminal.size(written)} in {terminal.duration(bar.seconds)}, {rate}/s, on disk")
    return dict(tensors or {})


def _record(
    out: "Console", request: Request, config: GrowConfig, place: Output, note: Mapping[str, Any], spent: _Step
) -> dict[str, Any]:
    """All that is known of the target. No time is in it: made again, it is the same."""
    certificate = None
    if config.certificate.enabled:
        began = time.monotonic()
        target = open_checkpoint("target", place.partial)
        certificate = _compare(out, request.source, target, config, request.preserving)
        spent.certificate_s = time.monotonic() - began
    return {
        "fingerprint": identity.identity(note["recipe"]),
        "recipe": note["recipe"],
        "source": {
            "name": card.checkpoint_name(request.source.directory),
            "model": request.source.model.model_dump(mode="json"),
        },
        "params_total": request.model.num_params,
        "params_active": request.model.num_active_params,
        "preserving": request.preserving,
        "certificate": certificate,
        "tensors": note["tensors"],
        "versions": {package: version(package) for package in ("aquilamoe", "torch")},
    }
