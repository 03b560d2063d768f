"""The job around a comparison: what may be named, what is written, exit codes."""

import csv
import dataclasses
import importlib.util
import json
import re
import shutil
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image

from cxr_dist.cli import run_job
from cxr_dist.compare import sources
from cxr_dist.compare.figures import MODEL_COLOURS, difference_figure, roc_figure
from cxr_dist.compare.judge import Entry, judge
from cxr_dist.compare.run import compare_models
from cxr_dist.config import Config, EvaluateConfig, TrackingConfig
from cxr_dist.errors import ConfigError, DataError, InputError
from cxr_dist.evaluate.scores import ScoreTable, read, write
from tests.comparing import noised, table
from tests.conftest import ROOT

FAST = Config(evaluate=EvaluateConfig(bootstrap=150))


def job() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compare_job", ROOT / "jobs/compare.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*argv: str) -> int:
    module = job()
    with pytest.raises(SystemExit) as left:
        run_job(module.main, description="", extra=module.add_flags, argv=[*argv, "--evaluate.bootstrap", "150"])
    return left.value.code


@pytest.fixture
def tables(tmp_path: Path) -> tuple[str, str]:
    write(table(), tmp_path / "a.parquet")
    write(noised(table(), "Mass"), tmp_path / "b.parquet")
    return str(tmp_path / "a.parquet"), str(tmp_path / "b.parquet")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("outputs/nih8.parquet", "nih8"),
        ("/data/preds.csv.gz", "preds"),
        ("outputs/xrv/scores.parquet", "xrv"),
        ("s3://b/runs/first/scores/test.parquet", "first"),
        ("s3://b/runs/first?region=x", "first"),
        ("s3://b/runs/first/checkpoints/000000/000000123.pt", "first/000000123"),
        ("models:/cxr@champion", "cxr@champion"),
        ("runs:/abc", "abc"),
        ("ours=s3://b/runs/first?region=x", "ours"),
        ("a b=x.csv", "a b"),
    ],
)
def test_a_model_is_called_by_its_name_or_the_end_of_its_uri(text: str, expected: str) -> None:
    name, uri = sources.named(text)
    assert name == expected
    assert text.endswith(uri)


@pytest.mark.parametrize("text", ["", "=x.csv", "name=", "a\nb=x.csv", "n" * 81 + "=x.csv"])
def test_names_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="models: found"):
        sources.named(text)


def test_the_job_writes_tables_figures_and_a_page(
    tables: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    assert run(*tables, "--out", str(out)) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["differences"]["b"]["loss"] == 1
    assert last["differences"]["b"]["mean"]["decision"] == "loss"
    whole = json.loads((out / "compare.json").read_text())
    assert whole["format"] == "cxr-dist/models/1"
    assert sorted(path.name for path in (out / "figures").iterdir()) == [
        "auroc_difference.png",
        "auroc_difference.svg",
        "roc_overlay.png",
        "roc_overlay.svg",
    ]
    for name in ("roc_overlay", "auroc_difference"):
        with Image.open(out / "figures" / f"{name}.png") as image:
            assert image.size[0] > 800
        assert ElementTree.parse(out / "figures" / f"{name}.svg").getroot().tag.endswith("svg")
    assert "| Mass |" in (out / "compare.md").read_text()
    page = (out / "compare.html").read_text()
    assert "<script" not in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert page.count("<svg") >= 2 or page.count("data:image/png") >= 2


def test_a_curve_for_every_model_in_every_panel_each_in_its_colour_and_dashes() -> None:
    entries = [Entry(name=name, scores=scores) for name, scores in (("a", table()), ("b", noised(table(), "Mass")))]
    result, found = judge(entries, bootstrap=0, seed=0)
    panels = roc_figure(found, result).axes
    assert [panel.get_title() for panel in panels] == ["Effusion", "Mass", "Nodule"]
    for panel in panels:
        drawn = [line for line in panel.lines if line.get_color() in MODEL_COLOURS and len(line.get_xdata()) > 2]
        assert [line.get_color() for line in drawn] == list(MODEL_COLOURS[:2])
        assert len({str(line._dash_pattern) for line in drawn}) == 2
        assert {text.get_text() for text in panel.texts} >= {
            f"{result['discrimination'][name][panel.get_title()]['auroc']['value']:.3f}" for name in "ab"
        }


def test_figures_of_many_models_and_undefined_findings() -> None:
    nobody = dataclasses.replace(table(), labels_NK=table().labels_NK & np.array([True, False, True]))
    result, entries = judge([Entry(name=f"${i}$ " + "x" * 60, scores=nobody) for i in range(12)], bootstrap=0, seed=0)
    assert "no positives" in roc_figure(entries, result).axes[1].texts[0].get_text()
    panels = difference_figure(result).axes
    assert len(panels) == 11
    assert "undefined" in [text.get_text() for text in panels[0].texts]
    assert panels[0].get_xlim() == (-0.01, 0.01)


def test_a_runs_folder_brings_its_validation_scores(tmp_path: Path) -> None:
    for number, scores in enumerate((table(), noised(table(), "Mass"))):
        write(scores, tmp_path / f"run{number}/scores/test.parquet")
        write(table(90, split="validation", first=7000), tmp_path / f"run{number}/scores/validation.parquet")
    entries = sources.read_entries(FAST, [str(tmp_path / "run0"), f"second={tmp_path / 'run1'}"], [], "test")
    assert [one.name for one in entries] == ["run0", "second"]
    assert [len(one.validation) for one in entries] == [90, 90]
    assert entries[1].origin.endswith("run1/scores/test.parquet")
    validation = sources.read_entries(FAST, [str(tmp_path / "run0")], [], "validation")[0]
    assert validation.scores.split == "validation"


def test_a_reports_folder_too_and_of_either_split(tmp_path: Path) -> None:
    write(table(), tmp_path / "a/scores.parquet")
    write(table(90, split="validation", first=7000), tmp_path / "a/validation_scores.parquet")
    write(table(90, split="validation", first=7000), tmp_path / "b/scores.parquet")
    assert len(sources.read_entries(FAST, [str(tmp_path / "a")], [], "test")[0].validation) == 90
    assert len(sources.read_entries(FAST, [str(tmp_path / "b")], [], "validation")[0].scores) == 90
    with pytest.raises(InputError, match=r"found neither scores/test\.parquet nor scores.parquet of split test"):
        sources.read_entries(FAST, [str(tmp_path / "b")], [], "test")


def test_validation_scores_are_given_by_the_models_name(tables: tuple[str, str], tmp_path: Path) -> None:
    fitted = tmp_path / "fitted.parquet"
    write(table(90, split="validation", first=7000), fitted)
    entries = sources.read_entries(FAST, list(tables), [f"b={fitted}"], "test")
    assert entries[0].validation is None
    assert len(entries[1].validation) == 90
    for wrong in (str(fitted), f"c={fitted}", "b="):
        with pytest.raises(ConfigError, match=r"--validation: found .* expected NAME=URI with one of a, b"):
            sources.read_entries(FAST, list(tables), [wrong], "test")


def release(tmp_path: Path, scores: ScoreTable, extra: int = 0) -> str:
    """A label CSV of a table's truth, with images that nobody scored after them."""
    rows = [
        ["Image Index", "Finding Labels", "Follow-up #", "Patient ID", "Patient Age", "Patient Gender", "View Position"]
    ]
    for image_id, patient, truth in zip(scores.image_ids, scores.patient_ids, scores.labels_NK, strict=True):
        named = "|".join(f for f, there in zip(scores.findings, truth, strict=True) if there) or "No Finding"
        rows.append([str(image_id), named, "0", str(patient), "50", "M", "PA"])
    rows += [[f"{99000 + i:08d}_000.png", "Hernia", "0", str(99000 + i), "50", "F", "AP"] for i in range(extra)]
    where = tmp_path / "labels.csv"
    with where.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return str(where)


def external(where: Path, scores: ScoreTable) -> str:
    with where.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Image Index", *(f"prob_{finding}" for finding in scores.findings)])
        for image_id, row in zip(scores.image_ids, scores.probabilities_NK, strict=True):
            writer.writerow([image_id, *map(repr, row.tolist())])
    return str(where)


def own_patients(scores: ScoreTable) -> ScoreTable:
    """NIH's names begin with the patient's number."""
    patients = np.array([int(name[:8]) for name in scores.image_ids.tolist()])
    return dataclasses.replace(scores, patient_ids=patients)


def test_tables_of_other_programs_with_the_labels_of_one_csv(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    scores = own_patients(table())
    labels = release(tmp_path, scores)
    write(scores, tmp_path / "ours.parquet")
    theirs = external(tmp_path / "theirs.csv", noised(scores, "Mass"))
    arguments = (str(tmp_path / "ours.parquet"), theirs, "--out", str(tmp_path / "out"))
    assert run(*arguments, "--data.labels", labels) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["differences"]["theirs"]["loss"] == 1
    assert found["labels"]["label_version"]
    assert run(*arguments) == 2
    assert "data.labels" in capsys.readouterr().err


def test_findings_and_images_that_nobody_knows(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    scores = own_patients(table())
    labels = release(tmp_path, scores.select(np.arange(240) > 0))
    write(scores, tmp_path / "ours.parquet")
    theirs = external(tmp_path / "theirs.csv", scores)
    (tmp_path / "odd.csv").write_text(Path(theirs).read_text().replace("prob_Mass", "prob_Masss"))
    for wrong, sentence in (
        (theirs, "1 of 240 image ids have no label, first '00000000_000.png'"),
        (str(tmp_path / "odd.csv"), "column 'prob_Masss' is no finding, the nearest is 'Mass'"),
    ):
        arguments = (wrong, str(tmp_path / "ours.parquet"), "--out", str(tmp_path / "out"), "--data.labels", labels)
        assert run(*arguments) == 2
        assert sentence in capsys.readouterr().err


def test_labels_that_are_not_the_tables_own(tmp_path: Path) -> None:
    scores = own_patients(table())
    write(scores, tmp_path / "a.parquet")
    labels = scores.labels_NK.copy()
    labels[3, 1] ^= True
    write(dataclasses.replace(scores, labels_NK=labels), tmp_path / "b.parquet")
    asked = [str(tmp_path / "a.parquet"), str(tmp_path / "b.parquet")]
    with pytest.raises(DataError, match="1 labels that differ"):
        compare_models(FAST, asked, out=tmp_path / "out")
    joined = dataclasses.replace(FAST, data=dataclasses.replace(FAST.data, labels=release(tmp_path, scores)))
    compare_models(joined, asked, out=tmp_path / "out")


def test_judged_images_are_held_to_the_test_list(tables: tuple[str, str], tmp_path: Path) -> None:
    where = tmp_path / "test_list.txt"
    where.write_text("\n".join(table().image_ids.tolist()))
    listed = dataclasses.replace(FAST, data=dataclasses.replace(FAST.data, test_list=str(where)))
    assert "test list" not in " ".join(compare_models(listed, tables, out=tmp_path / "out")["cautions"])
    assert "were not held to the official test list" in " ".join(
        compare_models(FAST, tables, out=tmp_path / "out")["cautions"]
    )
    where.write_text("\n".join(table().image_ids.tolist()[1:]))
    with pytest.raises(DataError, match="a: scores: found 1 images that are not in the test list"):
        compare_models(listed, tables, out=tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "models: found 0, expected at least two"),
        (("a",), "models: found 1, expected at least two"),
        (("a", "a"), "two that are called 'a'"),
        (("a", "x=nowhere"), "model nowhere: found nothing there"),
        (("a", "x=nowhere.csv"), "nowhere.csv: no such file"),
        (("a", "b", "--split", "validation"), "a: found scores of split test, expected validation"),
        (("a", "b", "--rule", "best"), "rule: found best, expected one of youden"),
        (("a", "x=models:/m/1", "--tracking.uri", "sqlite:///nowhere.db"), "tracking.uri: found no file"),
        (("a", "s3://key:secretsecret@bucket/x.csv"), "found a credential"),
        (("a", "x=s3://key:secretsecret@bucket/x.csv"), "found a credential"),
    ],
)
def test_what_the_job_refuses(
    arguments: tuple[str, ...], sentence: str, tables: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    known = dict(zip("ab", tables, strict=True))
    argv = [known.get(argument, argument) for argument in arguments]
    assert run(*argv, "--out", str(tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert re.search(sentence, error), error
    assert "secretsecret" not in error
    assert not (tmp_path / "out").exists()


def test_runs_and_registered_models_by_what_mlflow_keeps_of_them(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = MlflowClient(uri)
    experiment = client.create_experiment("e", (tmp_path / "artifacts").as_uri())
    with_tables = client.create_run(experiment, run_name="with tables").info.run_id
    write(table(), tmp_path / "report/scores.parquet")
    write(table(90, split="validation", first=7000), tmp_path / "report/validation_scores.parquet")
    client.log_artifacts(with_tables, str(tmp_path / "report"))
    shutil.rmtree(tmp_path / "report")
    with_folder = client.create_run(experiment, tags={"run_folder": str(tmp_path / "run")}).info.run_id
    write(noised(table(), "Mass"), tmp_path / "run/scores/test.parquet")
    client.create_registered_model("cxr")
    client.create_model_version("cxr", str(tmp_path / "run"), run_id=with_folder)
    client.set_registered_model_alias("cxr", "champion", "1")
    nothing = client.create_run(experiment).info.run_id

    config = dataclasses.replace(FAST, tracking=TrackingConfig(uri=uri, experiment="e"))
    asked = [f"runs:/{with_tables}", "models:/cxr/1", "models:/cxr@champion"]
    entries = sources.read_entries(config, asked, [], "test")
    assert [one.name for one in entries] == [with_tables, "cxr/1", "cxr@champion"]
    assert len(entries[0].validation) == 90
    assert f"run with tables ({with_tables})" in entries[0].origin
    assert entries[1].validation is None
    np.testing.assert_array_equal(
        entries[2].scores.probabilities_NK, read(tmp_path / "run/scores/test.parquet").probabilities_NK
    )
    for wrong, sentence in (
        (f"runs:/{nothing}", "found no checkpoint, neither"),
        ("runs:/0123456789abcdef0123456789abcdef", "does not give it"),
        ("models:/cxr/7", "does not give it"),
        ("models:/cxr", "expected models:/NAME/VERSION"),
    ):
        with pytest.raises(InputError, match=sentence):
            sources.read_entries(config, [wrong], [], "test")


def test_a_comparison_is_a_run_of_its_own_if_asked(
    tables: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    where = ("--tracking.uri", uri, "--tracking.experiment", "e")
    assert run(*tables, "--track", *where, "--out", str(tmp_path / "out")) == 0
    run_id = json.loads(capsys.readouterr().out.splitlines()[-1])["run_id"]
    client = MlflowClient(uri)
    found = client.get_run(run_id)
    assert found.info.status == "FINISHED"
    assert found.info.run_name == "compare a · b"
    assert found.data.metrics["model_1/loss"] == 1.0
    assert found.data.metrics["model_1/auroc_mean_difference"] < 0
    assert {entry.path for entry in client.list_artifacts(run_id)} >= {"compare.html", "compare.json", "figures"}


def test_a_server_that_is_away_is_said_and_the_files_are_there(
    tables: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    away = ("--track", "--tracking.uri", "http://127.0.0.1:9")
    assert run(*tables, *away, "--out", str(tmp_path / "out")) == 2
    assert "no MLflow server answers" in capsys.readouterr().err
    assert (tmp_path / "out/compare.html").is_file()


def test_the_note_of_a_table_travels_with_it(tables: tuple[str, str], tmp_path: Path) -> None:
    write(dataclasses.replace(noised(table(), "Mass"), note="it may have seen them"), tables[1])
    result = compare_models(FAST, tables, out=tmp_path / "out")
    assert "b: it may have seen them" in result["cautions"]
    assert "b: it may have seen them" in (tmp_path / "out/compare.html").read_text()
