"""Source and target compared on held-out tokens: the certificate, with the text that it was made on."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from aquilamoe import format
from aquilamoe.checkpoint.safetensors_header import ITEM_BYTES
from aquilamoe.config.grow import CertificateConfig
from aquilamoe.config.growth import GrowthConfig, ShrinkConfig, UpcyclingConfig
from aquilamoe.growth.bounds import NEARLY_TOKENS, certificate_bytes, default_tolerance, file_tolerance
from aquilamoe.growth.claim import Claim
from aquilamoe.growth.tool import held_out, identity
from aquilamoe.growth.tool.held_out import HeldOut
from aquilamoe.growth.tool.reporter import Reporter
from aquilamoe.growth.tool.request import AnyGrowth, CheckpointFiles, Request


def existing(
    source: CheckpointFiles, target: CheckpointFiles, record: Mapping[str, Any] | None, certificate: CertificateConfig
) -> Claim:
    """The claim of a target that exists: by its record, if it is by this tool, otherwise by the tolerance that is set.

    Of one whose recipe is lost, it is that of its logits alone.
    """
    if record is None:
        growth, preserving = None, certificate.tolerance is not None
    else:
        growth, preserving = _recorded(record), bool(record.get("preserving"))
    if preserving and growth is not None and growth.method == "split":  # directions are not kept
        growth = None
    return Claim(
        preserving=preserving,
        tolerance=tolerance(source, certificate, growth, target),
        growth=growth,
        seed=0 if record is None or growth is None else record["recipe"]["config"]["seed"],
    )


def known(growth: AnyGrowth) -> GrowthConfig | UpcyclingConfig | None:
    """The growth by which layers of the target can be compared with those of the source."""
    return None if isinstance(growth, ShrinkConfig) else growth


def _recorded(record: Mapping[str, Any]) -> GrowthConfig | UpcyclingConfig | None:
    settings = record["recipe"]["config"]
    if record["recipe"].get("version") != identity.VERSION:  # the same recipe made other weights then
        return None
    if "shrink" in settings:
        return None
    try:
        if "growth" in settings:
            return GrowthConfig.model_validate(settings["growth"])
        return UpcyclingConfig.model_validate(settings["upcycling"])
    except (KeyError, ValidationError):
        return None


def tolerance(
    source: CheckpointFiles,
    certificate: CertificateConfig,
    growth: GrowthConfig | UpcyclingConfig | None,
    target: CheckpointFiles | None = None,
) -> float:
    """How far a growth may be off that claims to keep the function, as a fraction of the logits' spread.

    Where the growth is not known, the type that rounds the most decides, of source and target.
    """
    if certificate.tolerance is not None:
        return certificate.tolerance
    if growth is not None:
        return default_tolerance(source.dtype)
    return max(file_tolerance(files.dtype) for files in (source, target) if files is not None)


def settings_for(growth: AnyGrowth | None, certificate: CertificateConfig) -> CertificateConfig:
    """The certificate's settings, with at least `NEARLY_TOKENS` tokens where KL and shares count, which are means."""
    if growth is None or growth.method not in ("split", "mix"):
        return certificate
    return certificate.model_copy(update={"tokens": max(certificate.tokens, NEARLY_TOKENS)})


def memory_bytes(request: Request, certificate: CertificateConfig) -> int:
    """The most that comparing source and target takes, over the libraries."""
    shape = held_out.shape(request.source.model, settings_for(request.growth, certificate))
    item_bytes = max(4, ITEM_BYTES[request.source.dtype])
    return certificate_bytes(request.source.model, request.model, *shape, item_bytes)


def compare(
    reporter: Reporter,
    source: CheckpointFiles,
    target: CheckpointFiles,
    *,
    text: HeldOut,
    claim: Claim,
) -> dict[str, Any]:
    """Measure how far apart two checkpoints are; UserError when they claim to be equal and are not."""
    import torch

    from aquilamoe.growth.certificate import certify

    with reporter.step("certificate", "layers") as bar:
        found: dict[str, Any] = certify(
            source.directory,
            target.directory,
            torch.from_numpy(text.tokens_bt),
            claim,
            bar.update,
        )
        bar.end(f"{found['tokens']:,} tokens in {format.duration(bar.seconds)}")
    return {**found, "text": text.text}
