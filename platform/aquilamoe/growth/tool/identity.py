"""What a target is: its recipe, with the source by the digests of its files; never where or when it was made."""

import hashlib
from collections.abc import Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

from aquilamoe.checkpoint import hf_config, links
from aquilamoe.checkpoint.companions import companions
from aquilamoe.config.messages import UserError
from aquilamoe.config.network import ModelConfig
from aquilamoe.config.schema import UpcyclingConfig
from aquilamoe.growth.tool.request import CheckpointFiles, Request, SourceText
from aquilamoe.pipeline import code
from aquilamoe.pipeline.fingerprint import Recipe, differences, fingerprint

# Raised by hand when the same recipe makes other files.
VERSION = 3
SHOWN_DIFFERENCES = 3
BUFFER_BYTES = 8 * 2**20


def inputs(request: Request, stop: Event | None = None) -> dict[str, dict[str, str]]:
    """The digests of all files that the target is made of, by source: `source`, `source_2`, ..."""
    return {
        "source" if number == 1 else f"source_{number}": dict(sorted(digests(_files(source), stop).items()))
        for number, source in enumerate(request.sources, 1)
    }


def _files(source: CheckpointFiles) -> list[Path]:
    """What of a source matters: weights, config.json, the files beside them that are copied, and the card."""
    weights = sorted({info.file for info in source.tensors.values()})
    card = [path for path in [source.directory / "README.md"] if path.is_file()]
    for path in card:
        links.check(path, source.directory)
    named = [source.directory / hf_config.CONFIG_FILE, *(source.directory / file for file in weights), *card]
    return [*named, *companions(source.directory)]


def digests(files: list[Path], stop: Event | None = None) -> dict[str, str]:
    """SHA-256 of every file by its name beside the first, as hubs of checkpoints list them; several are read at once.

    stop: once it is set, reading ends with CancelledError.
    """
    with ThreadPoolExecutor(max_workers=2) as pool:
        found = pool.map(lambda path: _digest(path, stop or Event()), files)
        return dict(zip((str(path.relative_to(files[0].parent)) for path in files), found, strict=True))


def _digest(path: Path, stop: Event) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(BUFFER_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            if stop.is_set():
                raise CancelledError
            digest.update(buffer[:count])
    return digest.hexdigest()


def recipe(request: Request, inputs: Mapping[str, Mapping[str, str]]) -> Recipe:
    """All that the bytes of the weights depend on; `inputs` are the digests of the files of its sources."""
    name = {"scale_up": "growth", "scale_out": "upcycling"}.get(request.kind, request.kind)
    # What a growth only carries follows from the source's config.json.
    model = request.model.model_dump(mode="json", exclude=set(ModelConfig.added))
    growth = request.growth.model_dump(mode="json")
    if request.texts:
        growth["texts"] = [_text(text) for text in request.texts]
    config: dict[str, Any] = {name: growth, "model": model, "dtype": _dtype(request), "seed": request.seed}
    if isinstance(request.growth, UpcyclingConfig) and request.growth.calibration_tokens and not request.texts:
        text = request.calibration_text
        config["calibration_text"] = "embedded" if text is None else digests([text])[text.name]
    changed = {"code": own} if (own := code.of(config)) else {}
    return {"kind": request.kind, "version": VERSION, "config": config, "inputs": dict(inputs), **changed}


def _text(text: SourceText) -> str:
    return text.name if text.path is None else digests([text.path])[text.path.name]


def _dtype(request: Request) -> str:
    """The types of the target: one for all tensors, or how they follow from the source's."""
    if len(set(request.dtypes.values())) == 1:
        return request.dtype_name
    kept = " but for norms and routers in float32" if request.dtype_policy.keep_float32 else ""
    return f"{request.dtype_policy.dtype}{kept}"


def identity(recipe: Recipe) -> str:
    """A short name of the recipe."""
    return fingerprint(recipe)


def changes(request: Request, record: Mapping[str, Any]) -> list[str]:
    """How the recipe of a record differs from the request's; the source is read only where nothing else differs."""
    old = record["recipe"]
    known = old["inputs"]
    names = ["source", *(f"source_{number}" for number in range(2, len(request.sources) + 1))]
    known = {name: known[name] if isinstance(known.get(name), dict) else {} for name in names}
    if changed := differences(old, recipe(request, known)):
        return changed
    changed = differences(old, recipe(request, inputs(request)))
    return [f"{line.split(' ', 1)[0]} has other bytes" for line in changed]


def check_same(target: Path, request: Request, record: Mapping[str, Any]) -> None:
    """UserError unless the target was made by this recipe."""
    if changed := changes(request, record):
        more = f" and {len(changed) - SHOWN_DIFFERENCES} more" if len(changed) > SHOWN_DIFFERENCES else ""
        raise UserError(
            f"target: {target} was made by another recipe ({'; '.join(changed[:SHOWN_DIFFERENCES])}{more}); nothing "
            "was changed, name another target or remove this one"
        )
