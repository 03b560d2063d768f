"""What people see of runs in MLflow's UI: rendered by a real browser, compared with what was logged.

The server keeps runs in Postgres and artifacts in S3. Pictures are kept in outputs/screenshots (CXR_SCREENSHOTS).
"""

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from cxr_dist.views import VIEWS, link
from tests.browser import Ui, chromium, is_drawn, traces
from tests.submitting import EPOCHS, find

pytestmark = pytest.mark.slow

MODE = "workflowType=machine_learning"


@pytest.fixture(scope="module")
def ui(full_stack, second_id, trained, second) -> Iterator[Ui]:
    with chromium(full_stack.addresses["mlflow"]) as found:
        yield found


@pytest.fixture(scope="module")
def straight(client: MlflowClient, ui: Ui) -> Run:
    [found] = find(client, "straight")
    return found


@pytest.fixture(scope="module")
def shorter(client: MlflowClient, ui: Ui) -> Run:
    [found] = find(client, "features-off")
    return found


def test_a_run_is_found_by_its_experiment_and_name_and_says_what_it_is(ui: Ui, straight: Run) -> None:
    page = ui.page
    ui.open("#/experiments")
    page.get_by_text("Model training", exact=True).first.click()  # once: the UI remembers it, and begins with GenAI
    page.get_by_role("link", name="nih14", exact=True).click()
    page.get_by_role("link", name="straight", exact=True).click()
    page.get_by_role("heading", name="straight").wait_for()
    page.get_by_text("Finished", exact=True).wait_for()
    for key in ("label_set", "split", "recipe", "world_size", "commit", "test_evaluation"):
        page.get_by_text(key, exact=True).first.wait_for()
    page.get_by_text("Trained from random weights").wait_for()
    ui.picture("run")


def test_a_runs_charts_are_what_was_logged(ui: Ui, client: MlflowClient, straight: Run) -> None:
    experiment, run_id = straight.info.experiment_id, straight.info.run_id
    ui.open(f"#/experiments/{experiment}/runs/{run_id}/model-metrics?{MODE}")
    # measured once: a bar, not a curve of one point
    bar = ui.chart("auroc_mean")
    assert bar.evaluate("plot => plot.data.map(trace => trace.type)") == ["bar"]
    ui.picture("run_metrics")
    ui.open(f"#/experiments/{experiment}/runs/{run_id}/system-metrics?{MODE}")
    ui.page.get_by_text(f"system/{socket.gethostname()}").first.wait_for()
    is_drawn(ui.chart("cpu_utilization_percentage"), width=250, height=150, colours=20)
    ui.picture("run_system")


@pytest.mark.parametrize("view", VIEWS)
def test_two_runs_are_compared_over_epochs_and_images(
    ui: Ui, client: MlflowClient, straight: Run, shorter: Run, view: str
) -> None:
    ui.open(link(straight.info.experiment_id, view))
    plot = ui.chart("val/auroc_mean")
    drawn = traces(plot)
    for run in (straight, shorter):
        logged = client.get_metric_history(run.info.run_id, "val/auroc_mean")
        axis = {point.step: point.value for point in client.get_metric_history(run.info.run_id, VIEWS[view])}
        x, y = drawn[run.info.run_name]
        assert x == [axis[point.step] for point in logged]
        assert y == pytest.approx([point.value for point in logged])
    if view == "by-epoch":
        assert drawn["straight"][0] == [1, 2, 3, 4][:EPOCHS]
    assert plot.locator(".xtitle").text_content() == VIEWS[view]
    is_drawn(plot, width=200, height=150, colours=20)
    ui.picture(f"compare_{view}")


def test_the_compare_page_has_both_runs_and_what_differs(ui: Ui, straight: Run, shorter: Run) -> None:
    ids = "%22%2C%22".join(run.info.run_id for run in (straight, shorter))
    ui.open(f"#/compare-runs?runs=%5B%22{ids}%22%5D&experiments=%5B%22{straight.info.experiment_id}%22%5D&{MODE}")
    for run in (straight, shorter):
        ui.page.get_by_role("cell", name=run.info.run_name, exact=True).first.wait_for()
    ui.page.get_by_text("train.epochs", exact=True).first.wait_for()
    ui.picture("compare_page")


def is_a_figure(ui: Ui) -> None:
    """The artifact viewer shows a picture of some size, with curves in several colours."""
    image = ui.page.locator("img[src^='blob:'][alt]")
    image.wait_for()
    ui.page.wait_for_function("image => image.naturalWidth > 500", arg=image.element_handle())
    is_drawn(image, width=400, height=300, colours=200)


def is_a_report(ui: Ui) -> None:
    """The artifact viewer shows the page in a frame, which may load nothing from elsewhere: text, numbers, figures."""
    frame = ui.page.frame_locator("iframe")
    heading = frame.get_by_role("heading", name="straight").first
    heading.wait_for()
    assert "Effusion" in frame.locator("table").first.inner_text()
    figure = frame.locator("figure").first
    figure.wait_for()
    is_drawn(figure, width=300, height=150, colours=50)
    heading.scroll_into_view_if_needed()


RENDERED: dict[str, Callable[[Ui], None]] = {"figures/roc_curves.png": is_a_figure, "report.html": is_a_report}
"""Artifacts that are opened in MLflow's viewer, and how it must show each."""


@pytest.mark.parametrize("path", RENDERED)
def test_an_artifact_is_seen_in_the_viewer(ui: Ui, straight: Run, path: str) -> None:
    ui.artifact(straight.info.experiment_id, straight.info.run_id, path)
    RENDERED[path](ui)
    ui.picture(f"artifact_{Path(path).stem}")
