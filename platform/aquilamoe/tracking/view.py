"""What MLflow's run page shows at once: a saved view, stored as a tag of the experiment and opened by its key.

The view is what MLflow's own button for sharing a view stores. Without it the page draws every metric by step, with the
parent runs, and the curves far down.
"""

import colorsys
import json
from typing import Any

VIEW = "curves"
VIEW_TAG = f"mlflow.sharedViewState.{VIEW}"
COLUMNS = ("val/loss", "lineage_flops", "tokens", "final.params_total", "final.params_active", "final.recovery_tokens")
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


def run_color(position: int, pipeline: int) -> str:
    """A color for a stage's curves: hues far apart by its position, the same in every pipeline, in another lightness.

    MLflow's own colors are hashes, and often the same for neighbours.
    """
    hue, lightness = position * 0.618034 % 1, (0.38, 0.58, 0.74)[(pipeline - 1) % 3]
    return "#" + "".join(f"{round(255 * part):02x}" for part in colorsys.hls_to_rgb(hue, lightness, 0.7))


def _chart(x: str) -> dict[str, Any]:
    return {
        "uuid": f"loss-by-{x}",
        "type": "LINE",
        "metricKey": "val/loss",
        "displayName": f"val/loss by {x}",
        "metricSectionId": SECTIONS[0],
        "xAxisKey": "metric",
        "selectedXAxisMetricKey": x,
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
