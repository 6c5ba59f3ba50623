"""The table of docs/first-run.md, of finished runs of the default experiment: python tools/first_run.py runs

A row for each seed and way of growing whose evaluation is in the store of that folder.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aquilamoe.format import power
from aquilamoe.pipeline.store import METRICS, read_points
from aquilamoe.reports.curves import chain_of, crossing, line_of, trained

CHAIN = ("prepare", "scale_up", "dense", "scale_out", "moe")
HEADER = (
    "growth",
    "seed",
    "prepare",
    "dense",
    "moe",
    "control",
    "moe - control",
    "English",
    "Chinese",
    "below from, FLOPs",
    "of the run",
)
Record = dict[str, Any]


def rows(stages: Path) -> Iterator[tuple[str, ...]]:
    """The cells of every finished run: losses on all held-out text, in nats/token, and where the curves cross."""
    for path in sorted(stages.glob("evaluate-*/record.json")):
        evaluated = json.loads(path.read_text(encoding="utf-8"))
        if not {"control", *CHAIN[::2]} <= evaluated["inputs"].keys():
            continue
        found = {name: _output(stages, evaluated["inputs"][name]) for name in ("control", "moe")}
        for name, source in zip(reversed(CHAIN), reversed(CHAIN[:-1]), strict=False):
            found[source] = _output(stages, found[name][1]["inputs"]["source"])
        yield _row(found, evaluated["metrics"])


def _output(stages: Path, reference: Record) -> tuple[Path, Record]:
    directory = stages / reference["directory"]
    return directory, json.loads((directory / "record.json").read_text(encoding="utf-8"))


def _row(outputs: dict[str, tuple[Path, Record]], metrics: dict[str, float]) -> tuple[str, ...]:
    def loss(stage: str, language: str = "") -> float:
        return metrics[f"{stage}/{language}/nats_per_token" if language else f"{stage}/nats_per_token"]

    def gap(language: str = "") -> str:
        return f"{loss('moe', language) - loss('control', language):+.3f}"

    records = {name: record for name, (_, record) in outputs.items()}
    curves = {name: read_points(directory / METRICS) for name, (directory, _) in outputs.items()}
    line = line_of(chain_of(records, curves, CHAIN)[0])
    crossed = crossing(line, trained("control", records["control"], curves["control"]).validation)
    return (
        records["scale_up"]["recipe"]["config"]["growth"]["method"],
        str(records["moe"]["recipe"]["config"]["seed"]),
        *(f"{loss(stage):.3f}" for stage in ("prepare", "dense", "moe", "control")),
        gap(),
        gap("en"),
        gap("zh"),
        power(crossed),
        f"{crossed / line.x[-1]:.0%}" if crossed else "-",
    )


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    table = [HEADER, ("---",) * len(HEADER), *sorted(rows(Path(sys.argv[1]) / "stages"))]
    print("\n".join(f"| {' | '.join(cells)} |" for cells in table))


if __name__ == "__main__":
    main()
