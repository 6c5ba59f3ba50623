"""What MLflow's run page shows at once: a saved view, stored as a tag of the experiment and opened by its key.

The view is what MLflow's own button for sharing a view stores. Without it the page draws every metric by step, with the
parent runs, and the curves far down.
"""

import colorsys
import json
from collections.abc import Sequence
from typing import Any

VIEW = "curves"
VIEW_TAG = f"mlflow.sharedViewState.{VIEW}"
PARAMETERS = "parameters"
PARAMETERS_TAG = f"mlflow.sharedViewState.{PARAMETERS}"
COLUMNS = ("val/loss", "lineage_flops", "tokens", "final.params_total", "final.params_active", "final.recovery_tokens")
FIGURES = ("objective", "minus_baseline", "loss_jump", "recovery_tokens", "lineage_flops")  # of an ablation's runs
# "Model metrics" is MLflow's name for metrics without a slash; sections that are not listed follow.
SECTIONS = ("Loss against compute", "val/loss", "train", "Model metrics")


def saved_view() -> str:
    """Validation loss of the training stages, overlaid, against all FLOPs and all tokens of the lineage."""
    first, *others = [
        {"uuid": name, "name": name, "display": True, "isReordered": True, "deleted": False, "isGenerated": False}
        for name in SECTIONS
    ]
    state = {
        "searchFilter": "tags.kind = 'pretrain'",
        "orderByKey": "metrics.`val/loss`",
        "orderByAsc": True,
        "runsHiddenMode": "SHOW_ALL",
        "selectedColumns": [f"metrics.`{key}`" for key in COLUMNS],
        "compareRunCharts": [_chart("lineage_flops"), _chart("lineage_tokens")],
        "compareRunSections": [first | {"columns": 2}, *others],
        "isAccordionReordered": True,
    }
    return json.dumps(state)


def comparison_views(axes: Sequence[str]) -> dict[str, str]:
    """Two views of an ablation, by their tags.

    Curves by tokens and by FLOPs and the objective, a line or bar for each variant: the mean over its seeds. And
    parallel coordinates of every run, which MLflow does not draw of groups. axes: the parameters that are varied.
    """
    curves = [
        _chart("step", "loss_by_tokens", "held-out loss, x: tokens of the stage"),
        _chart("step", "loss_by_gflops", "held-out loss, x: cumulative GFLOPs"),
        {**_card("BAR", "objective"), "metricKey": "objective"},
    ]
    parallel = _card("PARALLEL", "what decides") | {
        "selectedParams": [*axes, "seed"],
        "selectedMetrics": ["objective"],
        "showAllRuns": True,
    }
    groups = {"aggregateFunction": "average", "groupByKeys": [{"mode": "param", "groupByData": "variant"}]}
    return {
        VIEW_TAG: _comparison(axes, curves, "tags.kind != 'ablation'", groups),
        PARAMETERS_TAG: _comparison(axes, [parallel], "tags.kind = 'variant'", None),
    }


def _comparison(
    axes: Sequence[str], charts: Sequence[dict[str, Any]], search: str, groups: dict[str, Any] | None
) -> str:
    first, *others = [
        {"uuid": name, "name": name, "display": True, "isReordered": True, "deleted": False, "isGenerated": False}
        for name in ("Comparison", "Model metrics")
    ]
    state = {
        "searchFilter": search,
        "orderByKey": "metrics.`objective`",
        "orderByAsc": True,
        "runsHiddenMode": "SHOW_ALL",
        "groupBy": groups,
        "selectedColumns": [*(f"params.`{axis}`" for axis in axes), *(f"metrics.`{key}`" for key in FIGURES)],
        "compareRunCharts": [{**chart, "metricSectionId": first["uuid"]} for chart in charts],
        "compareRunSections": [first | {"columns": min(2, len(charts))}, *others],
        "isAccordionReordered": True,
    }
    return json.dumps(state)


def run_color(position: int, pipeline: int) -> str:
    """A color for a stage's curves: hues far apart by its position, the same in every pipeline, in another lightness.

    MLflow's own colors are hashes, and often the same for neighbours.
    """
    hue, lightness = position * 0.618034 % 1, (0.38, 0.58, 0.74)[(pipeline - 1) % 3]
    return "#" + "".join(f"{round(255 * part):02x}" for part in colorsys.hls_to_rgb(hue, lightness, 0.7))


def _card(kind: str, name: str) -> dict[str, Any]:
    return {
        "uuid": name.replace(" ", "-"),
        "type": kind,
        "displayName": name,
        "runsCountToCompare": 100,
        "deleted": False,
        "isGenerated": False,
    }


def _chart(x: str, metric: str = "val/loss", name: str | None = None) -> dict[str, Any]:
    """A line chart of a metric against another one, or against its own steps."""
    return {
        "uuid": f"{metric.removeprefix('val/')}-by-{x}",
        "type": "LINE",
        "metricKey": metric,
        "displayName": name or f"{metric} by {x}",
        "metricSectionId": SECTIONS[0],
        "xAxisKey": "step" if x == "step" else "metric",
        "selectedXAxisMetricKey": "" if x == "step" else x,
        "xAxisScaleType": "linear",
        "yAxisKey": "metric",
        "yAxisExpressions": [],
        "scaleType": "linear",
        "range": {},
        "lineSmoothness": 0,
        "useGlobalXaxisKey": False,
        "useGlobalLineSmoothing": True,
        "ignoreOutliers": False,
        "runsCountToCompare": 10,
        "deleted": False,
        "isGenerated": False,
    }
