"""MLflow's UI in a headless Chromium, as people see it: pages, charts, figures, and pictures of all of them."""

import contextlib
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WAIT_MS = 90_000
"""Longest wait for anything to appear, milliseconds: the machine may be busy with other tests."""
SIZE = {"width": 1400, "height": 900}

# the UI opens its assistant over half of the page on somebody's first visit, once
SETTLED = "localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true')"


class Ui:
    """A browser's page on an MLflow server; `shots` is the folder that pictures go to."""

    def __init__(self, page: Any, base: str, shots: Path):
        self.page, self.base, self.shots = page, base, shots

    def open(self, where: str) -> None:
        """Go to a place in the UI, afresh: `where` is what comes after the server's address."""
        self.page.goto("about:blank")
        self.page.goto(f"{self.base}/{where}", wait_until="domcontentloaded")

    def picture(self, name: str) -> None:
        """Keep a picture of what is seen now."""
        self.page.screenshot(timeout=WAIT_MS, path=str(self.shots / f"{name}.png"))

    def chart(self, title: str) -> Any:
        """The plot of the chart card with that title, once something is drawn in it."""
        card = self.page.locator("[data-testid='experiment-view-compare-runs-card']").filter(
            has=self.page.get_by_text(title, exact=True)
        )
        plot = card.locator(".js-plotly-plot").first
        plot.locator(".trace").first.wait_for(state="attached")
        plot.scroll_into_view_if_needed()
        return plot

    def artifact(self, experiment_id: str, run_id: str, path: str) -> None:
        """Open the viewer of a run's artifact."""
        self.open(f"#/experiments/{experiment_id}/runs/{run_id}/artifacts/{path}?workflowType=machine_learning")


def traces(plot: Any) -> dict[str, tuple[list[float], list[float]]]:
    """What a line chart draws, from the plot itself: name of the run → x and y."""
    found = plot.evaluate(
        "plot => plot.data.map(trace => [trace.name, Array.from(trace.x || []), Array.from(trace.y || [])])"
    )
    return {name: (x, y) for name, x, y in found if y}


def is_drawn(element: Any, *, width: int, height: int, colours: int) -> None:
    """An element is seen at that size at least, in that many colours at least, none of which fills it."""
    element.scroll_into_view_if_needed()
    pixels = np.asarray(Image.open(io.BytesIO(element.screenshot(timeout=WAIT_MS))).convert("RGB"))
    assert pixels.shape[0] >= height, pixels.shape
    assert pixels.shape[1] >= width, pixels.shape
    _, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_counts=True)
    assert len(counts) >= colours, f"{len(counts)} colours"
    assert counts.max() < 0.99 * counts.sum(), "one colour all over"


@contextlib.contextmanager
def chromium(base: str) -> Iterator[Ui]:
    """The UI of the server at `base`; the test is skipped where there is no Chromium."""
    driver = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install -e .[dev])")
    program = next((found for name in CHROMIUM if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip("no Chromium found; apt-get install chromium")
    shots = Path(os.environ.get("CXR_SCREENSHOTS", ROOT / "outputs" / "screenshots"))
    shots.mkdir(parents=True, exist_ok=True)
    with driver.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--disable-gpu", "--disable-dev-shm-usage"])
        context = browser.new_context(viewport=SIZE)
        context.set_default_timeout(WAIT_MS)
        context.add_init_script(SETTLED)
        try:
            yield Ui(context.new_page(), base.rstrip("/"), shots)
        finally:
            browser.close()
