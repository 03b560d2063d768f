"""Views of an experiment that MLflow's UI opens by a link: which charts, in which order, over which x axis, which columns.

The UI by itself lists charts by name, system metrics first, over optimizer steps; runs of different batch sizes then do
not line up. A view is a tag of the experiment in the form in which the UI (3.x) keeps those that people share; a UI that
does not know it says so and shows its own. This module holds all that is needed of that form.
"""

import json
from typing import Any

__all__ = ["VIEWS", "link", "view_tags"]

VIEWS = {
    "by-epoch": "epoch",
    "by-images": "images_seen",
}
"""Name of a view in its link → the metric that is its x axis."""

TAG = "mlflow.sharedViewState."

SECTIONS = {
    "Validation": ("val/auroc_mean", "val/loss"),
    "Training": ("train/loss", "train/lr", "train/images_per_s", "train/data_wait_fraction"),
    "Test": ("test/auroc_mean",),
}
COLUMNS = (
    *("metrics.`val/auroc_mean`", "metrics.`test/auroc_mean`", "params.`model.trainable`", "params.`model.pooling`"),
    *("params.`optimizer.lr`", "params.`train.global_batch`", "tags.`label_set`", "tags.`world_size`", "tags.`commit`"),
)


def link(experiment_id: str, view: str) -> str:
    """Where the UI shows a view: the part of the address after the server's."""
    return f"#/experiments/{experiment_id}/runs?workflowType=machine_learning&viewStateShareKey={view}&compareRunsMode=CHART"


def view_tags() -> dict[str, str]:
    """The tags of an experiment that hold the views."""
    return {f"{TAG}{name}": json.dumps(_state(x_axis)) for name, x_axis in VIEWS.items()}


def _state(x_axis: str) -> dict[str, Any]:
    """What the UI keeps of its page of runs."""
    sections = [{"uuid": name, "name": name, "display": True, "isReordered": True} for name in SECTIONS]
    charts = [_chart(metric, section) for section, metrics in SECTIONS.items() for metric in metrics]
    return {
        "searchFilter": "",
        "orderByKey": "attributes.start_time",
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": list(COLUMNS),
        "runsExpanded": {},
        "runsPinned": [],
        "runsHidden": [],
        "runsVisibilityMap": {},
        "runsHiddenMode": "FIRST_10_RUNS",
        "compareRunCharts": charts,
        "compareRunSections": [{**section, "deleted": False, "isGenerated": False} for section in sections],
        "viewMaximized": False,
        "runListHidden": False,
        "isAccordionReordered": True,
        "useGroupedValuesInCharts": True,
        "hideEmptyCharts": True,
        "groupBy": None,
        "groupsExpanded": {},
        "autoRefreshEnabled": True,
        "globalLineChartConfig": {"xAxisKey": "metric", "lineSmoothness": 0, "selectedXAxisMetricKey": x_axis},
    }


def _chart(metric: str, section: str) -> dict[str, Any]:
    common = {
        "uuid": f"view {metric}",
        "runsCountToCompare": 10,
        "metricSectionId": section,
        "deleted": False,
        "isGenerated": False,
        "displayName": metric,
        "metricKey": metric,
    }
    if section == "Test":  # measured once: bars
        return {"type": "BAR", **common}
    line = {
        "selectedMetricKeys": [metric],
        "lineSmoothness": 0,
        "xAxisScaleType": "linear",
        "scaleType": "linear",
        "range": {},
        "xAxisKey": "metric",
        "selectedXAxisMetricKey": "",
        "yAxisKey": "metric",
        "yAxisExpressions": [],
        "ignoreOutliers": False,
        "useGlobalXaxisKey": True,
        "useGlobalLineSmoothing": True,
    }
    return {"type": "LINE", **common, **line}
