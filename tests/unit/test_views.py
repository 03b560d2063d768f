"""Views that MLflow's UI opens by a link; tests/integration/test_browser.py sees them drawn."""

import json
from pathlib import Path

from mlflow import MlflowClient

from cxr_dist.experiment import create_run
from cxr_dist.views import VIEWS, link, view_tags


def test_a_view_has_every_chart_in_a_section_of_its_own_over_one_axis() -> None:
    for tag, text in view_tags().items():
        assert len(text) < 5000, "the longest tag of an experiment that MLflow 3.10 takes"
        state = json.loads(text)
        name = tag.removeprefix("mlflow.sharedViewState.")
        assert state["globalLineChartConfig"]["selectedXAxisMetricKey"] == VIEWS[name]
        sections = [section["uuid"] for section in state["compareRunSections"]]
        assert sections == ["Validation", "Training", "Test"]
        assert [chart["metricSectionId"] for chart in state["compareRunCharts"]] == sorted(
            (chart["metricSectionId"] for chart in state["compareRunCharts"]), key=sections.index
        )
        assert len({chart["uuid"] for chart in state["compareRunCharts"]}) == len(state["compareRunCharts"])


def test_an_experiment_gets_its_views_once_and_keeps_the_description_that_people_wrote(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(uri)
    create_run(client, uri, "new", "first")
    made = client.get_experiment_by_name("new")
    assert view_tags().items() <= made.tags.items()
    assert link(made.experiment_id, "by-epoch") in made.tags["mlflow.note.content"]
    client.set_experiment_tag(made.experiment_id, "mlflow.note.content", "ours")
    client.set_experiment_tag(made.experiment_id, "mlflow.sharedViewState.by-epoch", "of an earlier version")
    create_run(client, uri, "new", "second")
    again = client.get_experiment_by_name("new")
    assert again.tags["mlflow.note.content"] == "ours"
    assert view_tags().items() <= again.tags.items()
