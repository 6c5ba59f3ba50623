"""Ways of adding experts to a Mixture of Experts at the same top-k: what they do to predictions, as a table.

    python workflows/efficientscale.py experiment=split until=prepare
    python benchmarks/expert_split.py runs/stages/prepare-*/model

Every way grows the same checkpoint by the growth tool and is measured by its certificate, on validation text that
nothing was calibrated on. docs/signed-split.md has the result.
"""

import argparse
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import aquilamoe

Settings = dict[str, Any]
BLIND: Settings = {"direction": "random", "calibration_tokens": 0, "common_row": False}


def ways() -> Iterator[tuple[str, int, int, Settings]]:
    """Name, times the experts, times the experts of a token, and settings."""
    yield "copies, all of them chosen (k = 4)", 2, 2, {"method": "copy"}
    yield "copies", 2, 1, {"method": "copy"}
    yield "copies with noise 0.1 in the experts", 2, 1, {"method": "noise", "noise": 0.1}
    for shift in (3, 10, 30):
        yield f"split, random u without data, M = {shift}", 2, 1, {**BLIND, "shift": shift}
    for direction in ("random", "learned"):
        for number in (1, 3, 10, 30, "auto"):
            yield f"split, {direction} u, M = {number}", 2, 1, {"direction": direction, "shift": number}
    yield "split, learned u, M = 3, no common row", 2, 1, {"shift": 3, "common_row": False}
    yield "copies, 3 of each", 3, 1, {"method": "copy"}
    yield "split in 3 (clusters), M = 10", 3, 1, {"shift": 10}
    yield "copies, 4 of each", 4, 1, {"method": "copy"}
    yield "split in 4 (two directions), M = 10", 4, 1, {"shift": 10}


def row(name: str, certificate: Mapping[str, Any]) -> str:
    experts = certificate.get("experts")
    cells = [name, f"{certificate['kl']:.2g}", f"{certificate['target_loss'] - certificate['source_loss']:+.4f}"]
    cells.append(f"{certificate['max_abs_dlogit']:.2g}")
    if experts is None:
        return "| " + " | ".join([*cells, "100 %", "", "", ""]) + " |"
    fence = f"{experts['fence']:.1%}".replace("%", " %") if experts["needed_shift"] else ""
    same = f"{experts['same_originals']:.1%}".replace("%", " %")
    z_losses = f"{experts['z_loss_source']:.1f} -> {experts['z_loss_target']:.1f}"
    return "| " + " | ".join([*cells, same, fence, f"{experts['smallest_copy']:.2f}", z_losses]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="directory of a checkpoint with experts")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of each certificate")
    arguments = parser.parse_args()
    print("| way | KL | loss | largest logit difference | same experts | at the fence | smallest copy | z-loss |")
    print("|---|---|---|---|---|---|---|---|")
    for name, copies, chosen, settings in ways():
        with tempfile.TemporaryDirectory() as folder:
            grown = _grow(Path(arguments.source), Path(folder) / "grown", copies, chosen, settings, arguments.tokens)
        assert grown is not None
        print(row(name, grown), flush=True)


def _grow(
    source: Path, target: Path, copies: int, chosen: int, settings: Settings, tokens: int
) -> Mapping[str, Any] | None:
    """The certificate of one way."""
    same = aquilamoe.plan_growth(source, target, model={}, growth="fpi").model
    model = {"num_experts": copies * same["num_experts"], "num_experts_per_tok": chosen * same["num_experts_per_tok"]}
    how = {"method": "split", **settings}
    certificate = {"tokens": tokens, "sequence_length": 128}
    return aquilamoe.upcycle(source, target, model=model, upcycling=how, certificate=certificate).certificate


if __name__ == "__main__":
    main()
