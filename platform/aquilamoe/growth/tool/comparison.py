"""Source and target compared on held-out tokens: the certificate, with the text that it was made on."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from pydantic import ValidationError

from aquilamoe import format
from aquilamoe.checkpoint.safetensors_header import ITEM_BYTES
from aquilamoe.config.grow import CertificateConfig
from aquilamoe.config.schema import GrowthConfig, UpcyclingConfig
from aquilamoe.growth.bounds import NEARLY_TOKENS, certificate_bytes, default_tolerance, file_tolerance
from aquilamoe.growth.tool import held_out, identity
from aquilamoe.growth.tool.held_out import HeldOut
from aquilamoe.growth.tool.reporter import Reporter
from aquilamoe.growth.tool.request import CheckpointFiles, Request

if TYPE_CHECKING:
    from aquilamoe.growth.split import Split


@dataclass(frozen=True)
class Claim:
    """What a target is held to: whether it keeps the function, and by which growth, where that is known."""

    preserving: bool
    growth: GrowthConfig | UpcyclingConfig | None = None
    seed: int = 0
    split: "Split | None" = None

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Self:
        """The claim of a target by this tool; of one whose recipe is lost, that of its logits alone."""
        settings = record["recipe"]["config"]
        if record["recipe"].get("version") != identity.VERSION:  # the same recipe made other weights then
            return cls(bool(record.get("preserving")))
        try:
            growth: GrowthConfig | UpcyclingConfig | None = (
                GrowthConfig.model_validate(settings["growth"])
                if "growth" in settings
                else UpcyclingConfig.model_validate(settings["upcycling"])
            )
            if record["preserving"] and growth is not None and growth.method == "split":  # directions are not kept
                growth = None
            return cls(record["preserving"], growth, settings["seed"])
        except (KeyError, ValidationError):
            return cls(bool(record.get("preserving")))


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


def settings_for(growth: GrowthConfig | UpcyclingConfig | None, certificate: CertificateConfig) -> CertificateConfig:
    """The certificate's settings, with at least `NEARLY_TOKENS` tokens for a split: its KL and shares are means."""
    if growth is None or growth.method != "split":
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
    settings: CertificateConfig,
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
            preserving=claim.preserving,
            tolerance=tolerance(source, settings, claim.growth, target),
            growth=claim.growth,
            seed=claim.seed,
            progress=bar.update,
            split=claim.split,
        )
        bar.end(f"{found['tokens']:,} tokens in {format.duration(bar.seconds)}")
    return {**found, "text": text.text}
