"""Source and target compared on held-out tokens: the certificate, with the text that it was made on."""

from typing import TYPE_CHECKING, Any

from aquilamoe import terminal
from aquilamoe.config.growing import CertificateConfig
from aquilamoe.config.messages import UserError
from aquilamoe.growing import screen
from aquilamoe.growing.held_out import HeldOut
from aquilamoe.growing.request import Checkpoint

if TYPE_CHECKING:
    from rich.console import Console

TOLERANCES = {"F64": 1e-6, "F32": 1e-3, "F16": 0.05, "BF16": 0.5}


def tolerance(source: Checkpoint, certificate: CertificateConfig) -> float:
    """Largest difference of a logit that a growth may show that claims to keep the function."""
    return certificate.tolerance or TOLERANCES[source.dtype]


def compare(
    out: "Console",
    source: Checkpoint,
    target: Checkpoint,
    text: HeldOut,
    certificate: CertificateConfig,
    claims: bool,
) -> dict[str, Any]:
    """Measure how far apart two checkpoints are; UserError when they `claim` to be equal and are not."""
    if target.model.vocab_size < source.model.vocab_size:
        raise UserError(
            f"{target.directory}: vocab_size {target.model.vocab_size} is smaller than the source's "
            f"{source.model.vocab_size}; compare checkpoints of one tokenizer"
        )
    import torch

    from aquilamoe.growth.certificate import certify

    tokens_bt = torch.from_numpy(text.tokens_bt)
    with screen.Bar(out, "certificate", "layers") as bar:
        found: dict[str, Any] = certify(
            source.directory, target.directory, tokens_bt, claims, tolerance(source, certificate)
        )
        bar.end(f"{found['tokens']:,} tokens in {terminal.duration(bar.seconds)}")
    return {**found, "text": text.text}
