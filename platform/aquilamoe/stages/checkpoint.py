"""A checkpoint from elsewhere, complete in the store: later stages never read the original."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from aquilamoe.config.external import HUB, TOKENIZER, ExternalCheckpoint, vocabulary_of
from aquilamoe.config.graph import Node
from aquilamoe.config.messages import UserError
from aquilamoe.config.network import ModelConfig
from aquilamoe.config.paths import local
from aquilamoe.config.schema import CheckpointStage
from aquilamoe.estimates.work import moving_s
from aquilamoe.pipeline.stage import Context, Estimate, Metrics

if TYPE_CHECKING:
    from aquilamoe.checkpoint.digests import DigestCache

VERSION = 1
RESUMES = False
KNOWN = "checkpoints.json"  # below paths.root: digests of files that have been read
MAX_TOKENIZER_BYTES = 256 * 2**20
CARD, INDEX = "README.md", "*.safetensors.index.json"


def estimate(node: Node) -> Estimate:
    """Its bytes, if it is there: how it is placed, and so what of them takes room, the disk decides."""
    stage = cast(CheckpointStage, node.stage)
    directory = None if stage.path is None or stage.path.startswith(HUB) else local(stage.path)
    files = [directory / name for name in stage.files] if directory else []
    size = sum(path.stat().st_size for path in files if path.is_file())
    return Estimate(disk_bytes=size, seconds=moving_s(2 * size))


def inspect(stage: CheckpointStage, where: str, root: Path, downloads: bool) -> ExternalCheckpoint:
    """Find out what a checkpoint is, for a plan: its network, and the SHA-256 of its files.

    Files that have not changed since they were hashed are not read. A checkpoint that has been removed since is what it
    was: a store that has its output needs no more.

    Args:
        stage: with the path of the checkpoint, or, of a recipe, with its files and network.
        where: the stage's place in the configuration, for messages.
        root: of the store, where digests are kept.
        downloads: whether a checkpoint of a hub may be downloaded.

    Raises:
        UserError: there is no such checkpoint, it is damaged, or training cannot compute it.
    """
    from aquilamoe.checkpoint.digests import DigestCache

    key, known = f"{where}.path", DigestCache(root / KNOWN)
    if stage.path is None:
        if stage.model is None or not stage.files:
            raise UserError(
                f"{key}: no checkpoint is named; set it to a directory with a Hugging Face checkpoint, or to "
                f"{HUB}ORG/NAME@REVISION"
            )
        return ExternalCheckpoint(stage.model, stage.files, None)
    directory = _directory(stage.path, key, downloads)
    noted = known.find(directory)
    if noted is not None and not directory.exists():
        return ExternalCheckpoint(
            ModelConfig.model_validate(noted.facts["model"]), noted.files, noted.facts["vocabulary"]
        )
    return _read(directory, key, known)


def _read(directory: Path, key: str, known: "DigestCache") -> ExternalCheckpoint:
    """Check config.json and headers, hash what has changed, and note both."""
    from aquilamoe.checkpoint import fit, hf_config, packed

    if not directory.is_dir():
        what = "is a file" if directory.exists() else "no such directory"
        raise UserError(f"{key}: {directory}: {what}; name a directory with a Hugging Face checkpoint")
    model = hf_config.read_checkpoint_config(directory).model  # what only growth supports is refused where it trains
    fit.check(directory, model, packed.read(directory))
    vocabulary, found = _vocabulary(directory), known.look(directory, parts(directory))
    known.note(directory, replace(found, facts={"model": model.model_dump(mode="json"), "vocabulary": vocabulary}))
    return ExternalCheckpoint(model, found.files, vocabulary)


def parts(directory: Path) -> list[Path]:
    """The files of a checkpoint: weights and their index, config.json, the files that go with them, and the card."""
    from aquilamoe.checkpoint import companions, hf_config, links, safetensors_header

    weights = {directory / info.file for info in safetensors_header.read(directory).values()}
    others = [directory / hf_config.CONFIG_FILE, directory / CARD, *directory.glob(INDEX)]
    there = [path for path in others if path.is_file()]
    for path in there:
        links.check(path, directory)
    return sorted({*weights, *there, *companions.companions(directory)})


def _vocabulary(directory: Path) -> int | None:
    from aquilamoe.checkpoint import jsonfile

    path = directory / TOKENIZER
    return vocabulary_of(jsonfile.read(path, directory, MAX_TOKENIZER_BYTES)) if path.is_file() else None


def _directory(path: str, key: str, downloads: bool) -> Path:
    """Where a checkpoint is on this machine; one of a hub may have to be downloaded."""
    if not path.startswith(HUB):
        return local(path).absolute()
    from aquilamoe.checkpoint import hub

    return hub.find(key, hub.HubAddress.parse(key, path), downloads)


def run(context: Context) -> Metrics:
    """Put the files into the store; refuse those that have changed since they were planned with."""
    from aquilamoe.checkpoint.placing import place
    from aquilamoe.files import sha256

    node, stage = context.node, cast(CheckpointStage, context.node.stage)
    key = f"stages.{node.name}.path"
    assert node.model is not None
    if stage.path is None:
        raise UserError(f"{key}: not set, and the store lacks the checkpoint; set it to the checkpoint's directory")
    source, target = _directory(stage.path, key, downloads=True), context.out / "model"
    context.progress(0, len(stage.files), "files")
    for done, (name, digest) in enumerate(stage.files.items(), start=1):
        if not (source / name).is_file():
            raise UserError(
                f"{key}: {source / name}: no such file; restore the checkpoint, the store has no copy of it"
            )
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        place(source / name, target / name)
        if sha256(target / name) != digest:
            raise UserError(
                f"{key}: {source / name} has changed since the plan was made; run again, when it is complete"
            )
        context.progress(done, len(stage.files), "files")
    return {
        "params_total": node.model.num_params,
        "params_active": node.model.num_active_params,
        **stage.before.metrics,
    }
