"""Whether a source that this platform has made still has the bytes that its record names, before it is grown."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from aquilamoe.checkpoint.raw_reader import RawReader
from aquilamoe.config.messages import UserError
from aquilamoe.growth.tool import output
from aquilamoe.pipeline import integrity
from aquilamoe.pipeline.store import RECORD

READER = "the growth"


def check(source: Path) -> None:
    """UserError, one line, for a changed file of a stage's checkpoint, or a changed tensor of a grown one.

    A record of a growth has no samples: of more than `integrity.WHOLE_BYTES`, only `action=verify` reads the tensors.
    """
    integrity.check_checkpoint(source, READER)
    record = output.record(source)
    noted = record.get("tensors", {}) if record else {}
    with RawReader(source) as opened, ThreadPoolExecutor(integrity.HASHED_AT_ONCE) as pool:
        names = [name for name in noted if name in opened.tensors]
        if sum(opened.info(name).num_bytes for name in names) > integrity.WHOLE_BYTES:
            return
        for name, found in zip(names, pool.map(opened.digest, names), strict=True):
            if found != noted[name]:
                raise UserError(
                    f"{source}: tensor '{name}' has SHA-256 {found[:12]}, its record states {noted[name][:12]}, and "
                    f"{READER} does not read it; restore it or grow it again, or remove {RECORD} if you changed it"
                )
