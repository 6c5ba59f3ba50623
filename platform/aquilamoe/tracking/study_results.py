"""A study as it is sent to MLflow: which of its numbers are parameters, which are metrics, and what the page shows."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from aquilamoe.ablation.conclusions import conclusions, shown
from aquilamoe.ablation.study import SUMMARY, Entry, Seed, Study
from aquilamoe.reports import comparison
from aquilamoe.reports.comparison_curves import looks
from aquilamoe.tracking.studies import TrackedStudy, Trial

GIGA = 1e9


def compared(study: Study, folder: Path) -> TrackedStudy:
    """Of a study and the folder that has its page, figures and summary."""
    ranked = study.ranked()
    metrics = {"variants": float(len(ranked)), "seeds": float(len(study.seeds))}
    if ranked and ranked[0].mean is not None:
        metrics["best_objective"] = ranked[0].mean
    figures = sorted((folder / comparison.FIGURES).glob("*.png"))
    return TrackedStudy(
        name=study.name,
        description=study.description,
        note=note(study),
        axes=list(study.axes),
        params={
            "objective": f"{study.objective['stage']} {study.objective['metric']}",
            "baseline": study.baseline,
            "seeds": ", ".join(map(str, study.seeds)),
            **{f"axis.{axis}": ", ".join(values) for axis, values in study.axes.items()},
        },
        metrics=metrics,
        trials=list(_trials(study)),
        files={"": [folder / comparison.PAGE, folder / SUMMARY], comparison.FIGURES: figures},
    )


def note(study: Study) -> str:
    """The findings, and the ranks as a table, in Markdown."""
    claims = [f"- {'**Warning:** ' if each.kind == 'warning' else ''}{each.text}" for each in conclusions(study)]
    lines = [
        study.description,
        "",
        *claims,
        "",
        "| rank | variant | mean | minus baseline (95 %) |",
        "|---|---|---|---|",
    ]
    for entry in study.ranked():
        difference = shown(entry.to_baseline) if entry.to_baseline else ""
        lines.append(f"| {entry.rank} | {entry.name} | {entry.mean:.4f} | {difference} |")
    return "\n".join(lines)


def _trials(study: Study) -> Iterator[Trial]:
    tints = looks(study)
    reference = {n: seed.value for n, seed in study.find(study.baseline).seeds.items()}
    for entry in study.entries:
        look = tints.get(entry.name)
        for number, seed in entry.seeds.items():
            yield Trial(
                name=f"{entry.name}, seed {number}",
                fingerprint=seed.fingerprint,
                params=_params(study, entry, number, seed),
                tags=_tags(entry),
                metrics=_metrics(seed, reference.get(number)),
                curves={
                    "loss_by_tokens": [(round(tokens), loss) for tokens, _, loss in seed.curve],
                    "loss_by_gflops": [(round(flops / GIGA), loss) for _, flops, loss in seed.curve],
                    **({"expert_load": [(round(tokens), load) for tokens, load in seed.load]} if seed.load else {}),
                },
                colour=look.colour if look else "#9CA3AF",
            )


def _params(study: Study, entry: Entry, number: int, seed: Seed) -> Mapping[str, str]:
    """What is varied, first of all; of a control its kind stands for what it lacks."""
    source = study.ancestors.get(seed.ancestors[-1]) if seed.ancestors else None
    found = {
        "variant": entry.name,
        **{axis: entry.axes.get(axis, "(control)") for axis in study.axes},
        "seed": str(number),
        "control": entry.control.kind if entry.control else "none",
        "learning_rate": f"{entry.learning_rate:g}",
        "tokens": str(seed.tokens),
        "params_total": str(entry.params_total),
        "params_active": str(entry.params_active),
    }
    if source is not None:
        found["source_tokens_per_parameter"] = f"{source.tokens_per_parameter:.3g}"
    return found


def _tags(entry: Entry) -> Mapping[str, str]:
    if entry.control is not None:
        return {"kind": "control", "best_learning_rate": str(entry.control.best).lower()}
    return {"kind": "variant", "rank": str(entry.rank)}


def _metrics(seed: Seed, reference: float | None) -> Mapping[str, float]:
    found = {"objective": seed.value, "loss_end": seed.loss, "lineage_flops": seed.lineage_flops, **seed.figures}
    return found | ({"minus_baseline": seed.value - reference} if reference is not None else {})
