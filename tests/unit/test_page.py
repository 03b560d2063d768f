"""report.html: whole, true to evaluation.json, safe from the names in it, and in need of nothing else."""

import base64
import dataclasses
import hashlib
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cxr_dist.data.nih import LABEL_SETS
from cxr_dist.errors import DataError
from cxr_dist.evaluate import thumbnails
from cxr_dist.evaluate.html import SECTIONS, render
from cxr_dist.evaluate.inline import inline_figure, inline_thumbnail
from cxr_dist.evaluate.page import commands_of, write_page
from cxr_dist.evaluate.plots.panels import Picture, grid, head, save
from cxr_dist.evaluate.report import write_report
from cxr_dist.evaluate.runrecord import RunRecord
from cxr_dist.evaluate.scores import write
from cxr_dist.evaluate.worst import Example
from tests.releases import noise, png
from tests.reporting import made_up_cost, made_up_evaluation, made_up_run, made_up_scores

FINDINGS = LABEL_SETS["nih8"]
DEFINED = FINDINGS[:-1]
VOID = {"meta", "img", "br", "line", "circle", "path", "use", "rect"}
HOSTILE = "<script>alert('1')</script>\"><img src=x onerror=alert(2)>"


class Page(HTMLParser):
    """What a page holds: elements with their attributes, cells of its tables, text of its sections."""

    def __init__(self, content: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, dict[str, list[list[float]]]] = {}
        """Table to row to the exact values of each of its cells."""
        self.text: dict[str, str] = {}
        self.section = self.table = self.row = ""
        self.feed(content)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.elements.append((tag, given))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self.section = given["id"] or ""
        if tag == "table":
            self.table = given.get("class") or given.get("data-rule") or given.get("data-table") or ""
        if tag == "tr":
            self.row = given.get("data-finding") or given.get("data-group") or ""
        if tag == "td" and self.row:
            self.tables.setdefault(self.table, {}).setdefault(self.row, []).append([])
        if tag == "data" and self.row:
            self.tables[self.table][self.row][-1].append(float(given["value"] or "nan"))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "tr":
            self.row = ""
        if tag == "section":
            self.section = ""

    def handle_data(self, data: str) -> None:
        self.text[self.section] = self.text.get(self.section, "") + data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name == tag]


def picture(name: str) -> Picture:
    return Picture(name, '<svg viewBox="0 0 10 10"><path id="p1" d="M 0 0 L 1.23456 2"/></svg>', b"x" * 1000)


def rendered(evaluation: dict[str, Any], **more: Any) -> str:
    given = {"title": "nih8-first", "thresholds_source": "Youden's J on validation", "pictures": {}} | more
    return render(evaluation, **given)


@pytest.fixture(scope="module")
def evaluation() -> dict[str, Any]:
    return made_up_evaluation(made_up_scores(FINDINGS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, evaluation: dict[str, Any]) -> Path:
    """A whole report page with every figure and picture."""
    out = tmp_path_factory.mktemp("report")
    scores = made_up_scores(FINDINGS)
    write(scores, out / "scores.parquet")
    used = {finding: 0.3 for finding in FINDINGS}

    def illustrate(examples: list[Example]) -> list[Example]:
        shown = png(noise(1, 64))
        return [{**one, "thumbnail_png": shown, "overlay_png": shown} for one in examples]

    write_page(
        out,
        evaluation,
        scores,
        title="nih8-first",
        thresholds={"source": "Youden's J", "used": used, "findings": {f: {"youden": t} for f, t in used.items()}},
        pictures={"roc_curves": picture("roc_curves"), "pr_curves": picture("pr_curves")},
        run=made_up_run(FINDINGS),
        illustrate=illustrate,
    )
    return out


@pytest.fixture(scope="module")
def content(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(content: str) -> Page:
    return Page(content)


def test_files(folder: Path, content: str) -> None:
    rules = ("corner", "f1", "sensitivity_90", "specificity_90", "youden")
    names = [*(f"confusion_{rule}" for rule in rules), "decision_curves", "reliability", "subgroups"]
    names += ["throughput", "training_curves"]
    assert sorted(path.name for path in folder.iterdir()) == [
        "figures",
        "report.html",
        "run_record.json",
        "scores.parquet",
    ]
    assert sorted(path.name for path in (folder / "figures").iterdir()) == sorted(
        f"{name}.{kind}" for name in names for kind in ("png", "svg")
    )
    assert len(content) < 2_000_000
    record = RunRecord.from_json((folder / "run_record.json").read_bytes(), "x")
    assert record == made_up_run(FINDINGS)


def test_every_section_is_there_in_order_and_linked(page: Page) -> None:
    assert [attrs["id"] for attrs in page.all("section")] == list(SECTIONS)
    assert [attrs["href"] for attrs in page.all("a")] == [f"#{name}" for name in SECTIONS]
    figures = [attrs["id"] for attrs in page.all("figure") if attrs.get("id")]
    assert figures[:2] == ["figure-roc_curves", "figure-pr_curves"]
    assert len(figures) == 12
    drawn = [attrs for attrs in page.all("svg") if attrs.get("class") == "plot"]
    assert len(drawn) == 12
    assert all(attrs["role"] == "img" and attrs["aria-label"] for attrs in drawn)
    assert all(attrs.get("alt") for attrs in page.all("img"))


def test_nothing_is_fetched_and_nothing_runs(page: Page, content: str) -> None:
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in page.elements}
    for tag, attrs in page.elements:
        assert not [name for name in attrs if name.startswith("on")], tag
        for name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
            target = attrs.get(name)
            assert target is None or target.startswith(("#", "data:image/")), (tag, target)
    assert not re.search(r"@import|https?:|//\w+\.\w|expression\(", content)
    assert all(match.startswith("#") for match in re.findall(r"url\(([^)]*)\)", content))


def test_ids_are_unique_over_all_figures_and_resolve(page: Page, content: str) -> None:
    ids = [attrs["id"] for _, attrs in page.elements if attrs.get("id")]
    assert len(ids) == len(set(ids)) > 500
    references = re.findall(r'url\(#([^)]*)\)|href="#([^"]*)"', content)
    assert len(references) > 50
    assert {one or other for one, other in references} <= set(ids)


def test_the_headline_table_is_evaluation_json(page: Page, evaluation: dict[str, Any]) -> None:
    rows = page.tables["results"]
    assert list(rows) == [*FINDINGS, "mean"]
    for name in (*DEFINED, "mean"):
        found, points = evaluation["discrimination"][name], evaluation["operating_points"]["youden"]
        rule = points["mean"] if name == "mean" else points["findings"][name]
        expected = [list(found["auroc"].values()), [], list(found["average_precision"].values())]
        expected += [list(rule[key].values()) for key in ("sensitivity", "specificity")]
        assert rows[name][1:] == expected
    assert [rows[name][0] for name in DEFINED] == [[evaluation["discrimination"][f]["positives"]] for f in DEFINED]
    assert rows["Infiltration"] == [[0], []]
    assert "undefined: no positives" in page.text["results"]


def test_the_operating_points_are_evaluation_json(page: Page, evaluation: dict[str, Any]) -> None:
    for rule, one in evaluation["operating_points"].items():
        for name in DEFINED:
            point = one["findings"][name]
            cells = [[point["threshold"]]]
            cells += [list(point[key].values()) for key in ("sensitivity", "specificity", "precision", "f1")]
            cells += [[point[key]] for key in ("tp", "fn", "fp", "tn")]
            assert page.tables[rule][name] == cells


def test_calibration_subgroups_and_audit_are_as_given(page: Page, evaluation: dict[str, Any]) -> None:
    kinds = evaluation["calibration"]["kinds"].values()
    for name in DEFINED:
        expected = [[kind["findings"][name][key]] for kind in kinds for key in ("ece", "brier")]
        assert page.tables["calibration"][name] == expected
    assert page.tables["calibration"]["mean"] == [[kind["mean"][key]] for kind in kinds for key in ("ece", "brier")]
    group = evaluation["subgroups"]["age"]["65+"]
    cells = [[group["n_images"]], [group["n_patients"]], list(group["mean"]["auroc"].values()), []]
    assert page.tables["subgroups"]["age/65+"] == cells
    audit = made_up_run(FINDINGS).audit
    assert audit is not None
    positives = [audit[split]["positives"]["Mass"] for split in ("train", "validation", "test")]
    assert [cell for cell in page.tables["audit"]["Mass"] if cell] == [[n] for n in positives]
    # 38 of 240 images against 38 of 900
    assert "× 3.75" in page.text["data"]
    assert "No patient is in two splits." in page.text["data"]


def test_what_the_run_was(page: Page, folder: Path) -> None:
    run = made_up_run(FINDINGS)
    assert "2, then 1" in page.text["cost"]
    assert "15 min 13 s" in page.text["cost"]
    assert "number 3 of 5 in this experiment" in page.text["cost"]
    for needed in (
        run.origin["commit"],
        run.origin["manifest_sha256"],
        run.trained["weights_sha256"],
        *commands_of(run),
    ):
        assert needed in page.text["reproduce"]
    assert hashlib.sha256((folder / "scores.parquet").read_bytes()).hexdigest() in page.text["reproduce"]
    assert "python jobs/train.py --config config.yaml --run.name nih8-first-again" in page.text["reproduce"]
    assert "the checkpoint after epoch 6" in page.text["training"]


def test_what_it_cost(page: Page, evaluation: dict[str, Any]) -> None:
    text, amount = page.text["cost"], 0.19 + 2 * 0.4321
    for needed in (
        f"{amount:.2f} USD (2 attempts)",
        "87.6 % of the time, all GPUs",
        f"{54_321 / amount:,.0f} trained on",
    ):
        assert needed in text
    assert page.tables["cost"] == {
        "gpu.xlarge spot": [[2], [2.0], [0.4321], [2 * 0.4321], []],
        "head.large on-demand": [[1], [1.0], [0.19], [0.19], []],
    }
    assert "an invented bill, 2026-11-03" in text
    assert "no price known" not in text


def test_a_cost_that_is_not_known_says_why(evaluation: dict[str, Any]) -> None:
    run = made_up_run(FINDINGS)
    without = Page(rendered(evaluation, run=dataclasses.replace(run, cost=made_up_cost(prices=False)))).text["cost"]
    assert "no price known: multiply the node-hours by yours (2 attempts)" in without
    assert "the table has no row for gpu.xlarge spot" in without
    assert "Images for a dollar" not in without
    bounded = {**made_up_cost(prices=False), "at_most": 7.5, "gpu_utilization": None}
    text = Page(rendered(evaluation, run=dataclasses.replace(run, cost=bounded))).text["cost"]
    assert "at most 7.50 USD" in text
    assert "GPUs busyno GPU" in text.replace("\n", "")
    older = Page(rendered(evaluation, run=dataclasses.replace(run, cost=None))).text[
        "cost"
    ]  # a record of an earlier version
    assert "no price known" in older


def test_what_a_reader_must_know_first(evaluation: dict[str, Any]) -> None:
    def cautions(**more: Any) -> list[str]:
        content = rendered({**evaluation, **more.pop("evaluation", {})}, **more)
        note = re.search(r'<div class="cautions".*?</div>', content, re.DOTALL)
        return re.findall(r"<li>(.*?)</li>", note[0]) if note else []

    undefined = "In no mean, for it is undefined on these images: Infiltration."
    alone = "These are scores alone: how the model was trained, and on what, is not known here."
    assert cautions() == [undefined, alone]
    run = made_up_run(FINDINGS)
    assert cautions(run=run) == [
        undefined,
        "The network started from random weights, as in the demo: this says that the job works, no more.",
        "The test images have been evaluated 5 times in this experiment; this was number 3.",
        "Images that could not be read, and are in no number here: 1.",
    ]
    audit = {**(run.audit or {}), "patients_shared": 2}
    quiet = dataclasses.replace(run, origin={**run.origin, "weights": "imagenet"}, test_evaluations=1, unreadable=0)
    assert cautions(run=quiet) == [undefined]
    assert cautions(run=dataclasses.replace(quiet, audit=audit))[1:] == ["Patients in more than one split: 2."]
    assert "These are validation figures" in cautions(run=quiet, evaluation={"split": "validation"})[0]
    shared = {"validation": {"patients_shared": 7}}
    assert (
        cautions(run=quiet, evaluation=shared)[0] == "Patients of these images who are in the validation scores too: 7."
    )


def test_parts_that_are_missing_say_so(evaluation: dict[str, Any]) -> None:
    least = {
        key: evaluation[key] for key in ("format", "split", "n_images", "n_patients", "findings", "discrimination")
    }
    content = rendered(least)
    page = Page(content)
    assert [attrs["id"] for attrs in page.all("section")] == list(SECTIONS)
    for section in SECTIONS:
        if section not in ("results", "methods"):
            part = content[content.index(f'<section id="{section}"') :]
            assert 'class="absent"' in part[: part.index("</section>")], section
    assert "no threshold" in page.text["operating"].lower()
    assert "Sensitivity" not in page.text["results"]
    assert content.count('class="absent"') == 12  # subgroups have three parts
    run = dataclasses.replace(made_up_run(FINDINGS), history={}, history_missing="MLflow was away", audit=None)
    with_run = Page(rendered(evaluation, run=run))
    assert "No history: MLflow was away." in with_run.text["training"]
    assert "No audit" in with_run.text["data"]


def test_rules_without_any_threshold_are_no_rules(evaluation: dict[str, Any]) -> None:
    nothing = dict.fromkeys(("threshold", "tp", "fp", "fn", "tn")) | {"reason": "no validation scores were given"}
    points = {
        rule: one if rule == "f1" else {**one, "findings": dict.fromkeys(FINDINGS, nothing)}
        for rule, one in evaluation["operating_points"].items()
    }
    page = Page(rendered({**evaluation, "operating_points": points}))
    assert [name for name in page.tables if name in points] == ["f1"]
    assert "No thresholds were chosen" in page.text["operating"]


def test_names_are_escaped_wherever_they_come_from(evaluation: dict[str, Any], tmp_path: Path) -> None:
    text = json.dumps(evaluation).replace('"Mass"', json.dumps(HOSTILE)).replace("four radiologists", "<b>who</b>")
    hostile = json.loads(text)
    figure, cells = grid(1, title=HOSTILE, key=[HOSTILE], x_label=HOSTILE, y_label="$x$")
    head(cells[0], HOSTILE)
    run = made_up_run(FINDINGS)
    run = dataclasses.replace(run, name=HOSTILE, origin={**run.origin, "config": HOSTILE, "commit": HOSTILE})
    example = {"finding": HOSTILE, "image_id": HOSTILE, "probability": 0.5, "label": True, "kind": "false negative"}
    content = rendered(
        hostile,
        title=HOSTILE,
        thresholds_source=HOSTILE,
        pictures={"roc_curves": save(figure, tmp_path, "roc_curves")},
        examples=[{**example, "thumbnail_png": png(noise(1, 32)), "overlay_png": None}],
        run=run,
        commands=[HOSTILE],
    )
    page = Page(content)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "b>who"}
    assert all((attrs["src"] or "").startswith("data:image/jpeg") for attrs in page.all("img"))
    assert not [attrs for _, attrs in page.elements if "onerror" in attrs]
    for section in ("results", "operating", "subgroups", "errors", "reproduce"):
        assert "<script>alert('1')</script>" in page.text[section], section
    assert "<script>alert('1')</script>" in page.text["curves"]  # the text of the figure


def test_the_same_report_is_the_same_bytes(evaluation: dict[str, Any], tmp_path: Path) -> None:
    def drawn(name: str) -> Picture:
        figure, cells = grid(2, title="Trial, costs $1", key=["key"], x_label="x", y_label="y")
        cells[0].plot([0, 1], [0, 1], "o-")
        return save(figure, tmp_path, name)

    one, again = drawn("a"), drawn("a")
    assert one == again
    assert (tmp_path / "a.png").read_bytes() == one.png
    assert (tmp_path / "a.svg").read_text() == one.svg
    assert not re.search(r"<metadata|dc:date|20\d\d-\d\d", one.svg)
    assert "Trial, costs $1" in one.svg  # text is text, and no formula
    run = made_up_run(FINDINGS)
    assert rendered(evaluation, run=run) == rendered(evaluation, run=run)


def test_figures_are_inlined_as_what_is_smaller() -> None:
    svg = '<?xml version="1.0"?><svg xmlns="http://a" viewBox="0 0 7 8"><path id="p" d="M 1.23456\nL 2 3"/><use xlink:href="#p"/></svg>'
    small = inline_figure(Picture("roc", svg, b"x" * 1000), 'a "b"')
    assert small == (
        '<svg class="plot" role="img" aria-label="a &#34;b&#34;" viewBox="0 0 7 8">'
        '<path id="roc-p" d="M 1.23 L 2 3"/><use href="#roc-p"/></svg>'
    )
    large = inline_figure(Picture("roc", svg, b"x"), "a<b")
    assert large == '<img class="plot" alt="a&lt;b" src="data:image/png;base64,eA==">'


def test_thumbnails_are_small_jpegs() -> None:
    for pixels in (noise(1, 512), np.stack([noise(i, 100) for i in range(3)], axis=2)):
        uri = inline_thumbnail(png(pixels))
        head_, data = uri.split(",")
        assert head_ == "data:image/jpeg;base64"
        assert len(data) < 40_000
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            assert max(image.size) == min(192, pixels.shape[0])
            assert image.mode == ("L" if pixels.ndim == 2 else "RGB")


def test_boxes_that_maps_were_held_against(evaluation: dict[str, Any]) -> None:
    def value(middle: float) -> dict[str, float]:
        return {"value": middle, "lower": middle - 0.01, "upper": middle + 0.01}

    iou = {f"0.{tenth}": value(0.8 - 0.1 * tenth) for tenth in range(1, 8)}
    found = {"n_boxes": 5, "pointing": {**value(0.9), "chance": 0.25}, "iou": iou}
    none = {"n_boxes": 0, "pointing": None, "iou": None, "reason": "no boxes"}
    page = Page(rendered(evaluation, localisation={"findings": {"Mass": found, "Nodule": none}}))
    cells = [[5], list(value(0.9).values()), [0.25]]
    cells += [list(iou[at].values()) for at in ("0.1", "0.3", "0.5")]
    assert page.tables["boxes"] == {"Mass": cells}
    assert "boxes" not in Page(rendered(evaluation)).tables


def test_thumbnails_are_the_datasets_pixels_or_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    example = Example(
        finding="Mass",
        image_id="a.png",
        probability=0.9,
        label=False,
        kind="false positive",
        thumbnail_png=None,
        overlay_png=None,
    )
    assert thumbnails.with_thumbnails([example], str(tmp_path), "test") == [example]
    assert "found no manifest" in caplog.text
    monkeypatch.setattr(thumbnails.Manifest, "load", lambda uri: uri)
    monkeypatch.setattr(thumbnails, "picked_images", lambda *_: iter([{"a.png": noise(3, 16)}]))
    [found] = thumbnails.with_thumbnails([example], "uri", "test")
    assert found["thumbnail_png"] is not None
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(found["thumbnail_png"]))), noise(3, 16))


def test_a_record_of_another_format_is_refused() -> None:
    run = made_up_run(FINDINGS)
    assert RunRecord.from_json(run.to_json(), "x") == run
    for content in ("", "[]", "{}", '{"format": "cxr-dist/run-record/2"}', '{"format": "cxr-dist/run-record/1"}'):
        with pytest.raises(DataError, match="found another file, expected a run's record"):
            RunRecord.from_json(content, "r.json")


def test_write_report_makes_the_page_of_its_numbers(tmp_path: Path) -> None:
    scores, validation = (
        made_up_scores(("Mass", "Effusion", "Hernia")),
        made_up_scores(("Mass", "Effusion", "Hernia"), split="validation"),
    )
    result = write_report(
        tmp_path, scores, validation, bootstrap=20, title="Trial", commands=["python jobs/evaluate.py"]
    )
    page = Page((tmp_path / "report.html").read_text())
    expected = [result["auroc"]["Mass"], *result["auroc_interval"]["Mass"]]
    assert page.tables["results"]["Mass"][1] == expected
    assert "python jobs/evaluate.py" in page.text["reproduce"]
    assert {attrs["id"] for attrs in page.all("figure") if attrs.get("id")} >= {"figure-roc_curves", "figure-pr_curves"}
    assert not (tmp_path / "run_record.json").exists()
