"""The report: its files, its numbers against scikit-learn, thresholds from validation, and the job around it."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.metrics import classification_report, roc_auc_score

from cxr_dist.cli import run_job
from cxr_dist.data import nih
from cxr_dist.errors import DataError
from cxr_dist.evaluate.figures import COLOURS
from cxr_dist.evaluate.report import AVERAGES, table, write_report
from cxr_dist.evaluate.scores import ScoreTable, read, write
from cxr_dist.evaluate.second_labels import read_second_labels
from cxr_dist.evaluate.thresholds import RULES

ROOT = Path(__file__).resolve().parent.parent.parent
FINDINGS = ("Effusion", "Mass", "Hernia")


def scored(split: str, num: int = 300, first: int = 0, findings: tuple[str, ...] = FINDINGS) -> ScoreTable:
    """Random scores that know something; the last finding has no positives in the test split."""
    rng = np.random.default_rng(first)
    labels = rng.random((num, len(findings))) < 0.3
    if split == "test" and len(findings) > 1:
        labels[:, -1] = False
    return ScoreTable(
        image_ids=np.array([f"{first + i:08d}_000.png" for i in range(num)], dtype=np.str_),
        patient_ids=first + np.arange(num) // 3,
        split=split,
        findings=findings,
        probabilities_NK=np.clip(rng.normal(0.1 + 0.2 * labels, 0.15), 0, 1),
        logits_NK=None,
        labels_NK=labels,
    )


def test_files_and_result(tmp_path: Path) -> None:
    scores, validation = scored("test"), scored("validation", first=1000)
    result = write_report(tmp_path, scores, validation, bootstrap=30, seed=0, title="Trial")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "auroc.csv",
        "classification_report.json",
        "classification_report.md",
        "curves.csv",
        "evaluation.json",
        "figures",
        "report.html",
        "scores.parquet",
        "thresholds.json",
        "validation_scores.parquet",
    ]
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert (result["split"], result["n_scored"], result["n_patients"]) == ("test", 300, 100)
    assert list(result["auroc"]) == [*FINDINGS, "mean"]
    assert result["auroc"]["mean"] == pytest.approx((result["auroc"]["Effusion"] + result["auroc"]["Mass"]) / 2)
    low, high = result["auroc_interval"]["Mass"]
    assert low < result["auroc"]["Mass"] < high
    assert result["auroc"]["Hernia"] is None
    assert result["auroc_interval"]["Hernia"] is None
    assert result["reasons"] == {"Hernia": "no positives"}
    assert json.loads((tmp_path / "thresholds.json").read_text()) == result["thresholds"]
    np.testing.assert_array_equal(read(tmp_path / "scores.parquet").probabilities_NK, scores.probabilities_NK)
    assert read(tmp_path / "validation_scores.parquet").split == "validation"


def test_classification_report_is_scikit_learns_at_validation_thresholds(tmp_path: Path) -> None:
    scores, validation = scored("test"), scored("validation", first=1000)
    result = write_report(tmp_path, scores, validation, bootstrap=0)
    used = result["thresholds"]["used"]
    assert used == {f: result["thresholds"]["findings"][f]["youden"] for f in FINDINGS}
    called = scores.probabilities_NK[:, :2] >= [used["Effusion"], used["Mass"]]
    expected = classification_report(
        scores.labels_NK[:, :2], called, target_names=FINDINGS[:2], output_dict=True, zero_division=0
    )
    found = json.loads((tmp_path / "classification_report.json").read_text())
    assert found.pop("Hernia") == {"precision": None, "recall": None, "f1-score": None, "support": 0}
    assert list(found) == ["Effusion", "Mass", *AVERAGES]
    for name, row in found.items():
        assert row == pytest.approx(expected[name], abs=1e-12)
    assert result["report"]["macro_f1"] == found["macro avg"]["f1-score"]
    text = (tmp_path / "classification_report.md").read_text()
    assert "Thresholds: Youden's J on the validation split, 300 images" in text
    assert "| Hernia | 0.1" in text or "| Hernia | 0.2" in text
    assert "-: no positives, and in no average: Hernia." in text


def test_a_probability_equal_to_the_threshold_is_called_present(tmp_path: Path) -> None:
    scores = scored("test", num=4, findings=("Mass",))
    halves = np.array([[0.5], [0.5], [0.4], [0.4]])
    labels = np.array([[True], [False], [True], [False]])
    scores = dataclasses.replace(scores, probabilities_NK=halves, labels_NK=labels)
    write_report(tmp_path, scores, bootstrap=0)
    found = json.loads((tmp_path / "classification_report.json").read_text())["Mass"]
    assert (found["precision"], found["recall"]) == (0.5, 0.5)


def test_one_finding_is_reported_like_many(tmp_path: Path) -> None:
    scores = scored("test", findings=("Mass",))
    write_report(tmp_path, scores, bootstrap=0)
    found = json.loads((tmp_path / "classification_report.json").read_text())
    assert list(found) == ["Mass", *AVERAGES]
    called, truth = scores.probabilities_NK[:, 0] >= 0.5, scores.labels_NK[:, 0]
    assert found["Mass"]["precision"] == pytest.approx((called & truth).sum() / called.sum())
    assert found["Mass"]["support"] == truth.sum()


def test_without_validation_thresholds_are_a_half_and_said_so(tmp_path: Path) -> None:
    result = write_report(tmp_path, scored("test"), bootstrap=0)
    assert set(result["thresholds"]["used"].values()) == {0.5}
    assert result["thresholds"]["findings"] == {}
    assert "0.5 for every finding, for no validation" in (tmp_path / "classification_report.md").read_text()
    assert not (tmp_path / "validation_scores.parquet").exists()


def test_a_finding_undefined_on_validation_falls_back_and_is_named(tmp_path: Path) -> None:
    validation = scored("validation", first=1000)
    labels = validation.labels_NK.copy()
    labels[:, 1] = False
    result = write_report(tmp_path, scored("test"), dataclasses.replace(validation, labels_NK=labels), bootstrap=0)
    assert result["thresholds"]["used"]["Mass"] == 0.5
    assert result["thresholds"]["findings"]["Mass"] == dict.fromkeys(RULES)
    assert "(0.5 for Mass: undefined there)" in result["thresholds"]["source"]


def test_test_scores_cannot_choose_thresholds(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found scores of split 'test', expected validation"):
        write_report(tmp_path / "a", scored("test"), scored("test"), bootstrap=0)
    with pytest.raises(DataError, match="300 images are both in the test scores and in the validation scores"):
        write_report(tmp_path / "b", scored("test"), scored("validation"), bootstrap=0)
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "b").exists()


def test_a_report_on_validation_itself_says_that_thresholds_saw_it(tmp_path: Path) -> None:
    validation = scored("validation")
    result = write_report(tmp_path, validation, validation, bootstrap=0)
    assert result["thresholds"]["source"].endswith("which are the very images judged here")
    curves = pd.read_csv(tmp_path / "curves.csv")
    assert not curves.duplicated().any()


def test_auroc_csv_and_curves_csv(tmp_path: Path) -> None:
    result = write_report(tmp_path, scored("test"), scored("validation", first=1000), bootstrap=30)
    frame = pd.read_csv(tmp_path / "auroc.csv").set_index("finding")
    names = "auroc lower upper average_precision ap_lower ap_upper positives negatives reason"
    assert list(frame.columns) == names.split()
    assert frame.loc["Mass", "auroc"] == result["auroc"]["Mass"]
    assert [frame.loc["mean", "lower"], frame.loc["mean", "upper"]] == result["auroc_interval"]["mean"]
    assert np.isnan(frame.loc["Hernia", "auroc"])
    assert (frame.loc["Hernia", "reason"], frame.loc["Hernia", "negatives"]) == ("no positives", 300)
    curves = pd.read_csv(tmp_path / "curves.csv")
    assert list(curves.columns) == ["split", "finding", "kind", "x", "y", "threshold"]
    roc = curves[(curves.split == "test") & (curves.finding == "Mass") & (curves.kind == "roc")]
    assert roc.iloc[0, 3:].tolist() == [0, 0, np.inf]
    assert roc.iloc[-1, 3:5].tolist() == [1, 1]
    area = float(np.trapezoid(roc.y, roc.x))
    assert area == pytest.approx(result["auroc"]["Mass"], abs=1e-6)
    assert set(curves[curves.finding == "Hernia"].split) == {"validation"}


def test_figures_are_drawn_even_where_nothing_is_defined(tmp_path: Path) -> None:
    write_report(tmp_path, scored("test").select(np.zeros(300, bool)), bootstrap=10)
    for name in ("roc_curves.png", "pr_curves.png"):
        with Image.open(tmp_path / "figures" / name) as image:
            assert image.getpixel((0, 0))[:3] == (255, 255, 255)
            assert image.width > 500


def test_every_finding_has_a_colour_of_its_own() -> None:
    assert set(COLOURS) == set(nih.FINDINGS)
    assert len(set(COLOURS.values())) == len(COLOURS)
    for colour in COLOURS.values():
        red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (red, green, blue)]
        luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
        assert 1.05 / (luminance + 0.05) >= 3  # WCAG contrast of graphics on white


def test_table_for_the_terminal(tmp_path: Path) -> None:
    result = write_report(tmp_path, scored("test"), bootstrap=30)
    lines = table(result).splitlines()
    assert lines[0].split() == ["finding", "AUROC", "95", "%", "interval", "AP", "95", "%", "interval", "positives"]
    assert lines[2].startswith(f"Mass      {result['auroc']['Mass']:.3f}  {result['auroc_interval']['Mass'][0]:.3f} - ")
    assert lines[3].split() == ["Hernia", "-", "no", "positives"]
    assert lines[4].startswith("mean      0.")
    assert max(map(len, lines[:5])) <= 80


def test_a_second_source_is_a_second_column(tmp_path: Path) -> None:
    text = "Image Index,Nodule or mass,Fracture\n" + "".join(f"{i:08d}_000.png,{i % 2},1\n" for i in range(40))
    (tmp_path / "labels.csv").write_text(text)
    second = read_second_labels(tmp_path / "labels.csv")
    scores = scored("test")
    result = write_report(tmp_path / "out", scores, scored("validation", first=1000), bootstrap=10, second=second)
    evaluation = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert result["second_labels"] == evaluation["second_labels"]
    expected = roc_auc_score(np.arange(40) % 2, scores.probabilities_NK[:40, 1])
    assert evaluation["second_labels"]["findings"]["Nodule or mass"]["auroc"]["value"] == pytest.approx(expected)
    lines = table(result).splitlines()[-4:]
    assert lines[0] == "by the labels of labels.csv (40 of its images were scored):"
    assert lines[1].startswith(f"  Nodule or mass, 20 positives: {expected:.3f} 0.")
    assert lines[2:] == ["    scored by the greatest of Mass", "  none of the scored findings is like Fracture"]


def test_evaluation_json_has_subgroups_where_rows_are_given(tmp_path: Path) -> None:
    scores = scored("test")
    header = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position\n"
    rows = [f"{name},No Finding,0,{int(name[:8])},57,{'MF'[i % 2]},PA" for i, name in enumerate(scores.image_ids)]
    labels = nih.read_labels((header + "\n".join(rows)).encode(), "labels")
    write_report(tmp_path, scores, bootstrap=5, rows=labels)
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    assert {name: one["n_images"] for name, one in evaluation["subgroups"]["sex"].items()} == {"M": 150, "F": 150}


def test_reports_need_no_ray_torch_or_mlflow() -> None:
    code = (
        "import sys, cxr_dist.evaluate.report; "
        "print(sorted({'ray', 'torch', 'mlflow', 'matplotlib.pyplot'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def run_in_process(*arguments: str | Path) -> int:
    """The job without a process of its own; its exit code."""
    spec = importlib.util.spec_from_file_location("evaluate_job", ROOT / "jobs" / "evaluate.py")
    assert spec is not None
    assert spec.loader is not None
    job = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(job)
    argv = ["--evaluate.bootstrap", "20", *map(str, arguments)]
    with pytest.raises(SystemExit) as stop:
        run_job(job.main, description="", extra=job.add_flags, argv=argv)
    return int(stop.value.code or 0)


def test_job_on_own_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(scored("test"), tmp_path / "test.parquet")
    write(scored("validation", first=1000), tmp_path / "validation.parquet")
    flags = ["--scores", tmp_path / "test.parquet", "--out", tmp_path / "out", "--json", tmp_path / "result.json"]
    assert run_in_process(*flags, "--validation-scores", tmp_path / "validation.parquet") == 0
    *human, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert result["thresholds"]["source"].startswith("Youden's J on the validation split")
    assert human[0].startswith("finding")
    assert (tmp_path / "out" / "figures" / "roc_curves.png").is_file()


def test_job_cleans_a_foreign_table_as_nih8_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    header = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position\n"
    rows = ["1.png,Mass,0,1,57,M,PA", "2.png,Mass|Hernia,0,2,58,M,PA", "3.png,No Finding,0,3,80,F,AP"]
    (tmp_path / "labels.csv").write_text(header + "\n".join(rows) + "\n")
    (tmp_path / "scores.csv").write_text("image_id,Mass\n1.png,0.5\n2.png,0.1\n3.png,0.2\n")
    flags = ["--scores", tmp_path / "scores.csv", "--data.labels", tmp_path / "labels.csv", "--out", tmp_path / "out"]
    assert run_in_process(*flags, "--data.label_set", "nih8") == 0
    human, last = capsys.readouterr().out.rstrip().rsplit("\n", 1)
    result = json.loads(last)
    assert (result["n_scored"], result["n_left_out"], result["auroc"]["Mass"]) == (2, 1, 1.0)
    assert "left out: 1 images with a finding outside nih8" in human
    assert run_in_process(*flags, "--train.skip_findings", '["Hernia"]') == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["n_scored"], result["n_left_out"], result["auroc"]["Mass"]) == (3, 0, 0.5)


def test_job_compares_scored_images_with_the_test_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    header = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position\n"
    rows = [f"{n}.png,{'Mass' if n % 2 else 'No Finding'},0,{n},57,M,PA" for n in range(1, 5)]
    (tmp_path / "labels.csv").write_text(header + "\n".join(rows) + "\n")
    (tmp_path / "scores.csv").write_text("image_id,Mass\n1.png,0.5\n2.png,0.1\n")
    flags = ["--scores", tmp_path / "scores.csv", "--data.labels", tmp_path / "labels.csv", "--out", tmp_path / "out"]
    flags += ["--data.test_list", tmp_path / "test_list.txt"]
    (tmp_path / "test_list.txt").write_text("1.png\n2.png\n4.png")
    assert run_in_process(*flags) == 0
    human, last = capsys.readouterr().out.rstrip().rsplit("\n", 1)
    assert json.loads(last)["n_missing"] == 1
    assert "not scored: 1 images of the test list" in human
    (tmp_path / "test_list.txt").write_text("1.png\n4.png")
    assert run_in_process(*flags) == 2
    assert "found 1 images that are not in the test list" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "found neither or both of --scores and --checkpoint"),
        (("--scores", "a", "--checkpoint", "b"), "found neither or both of --scores and --checkpoint"),
        (("--checkpoint", "b", "--validation-scores", "c"), "--validation-scores goes with --scores"),
        (("--scores", "missing.parquet"), "missing.parquet: no such file"),
        (("--scores", "missing.csv", "--data.labels", "labels.csv"), "data.labels: no file at labels.csv"),
        (("--scores", "x", "--split", "train"), "split"),
    ],
)
def test_job_bad_input_exits_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], message: str
) -> None:
    assert run_in_process(*flags, "--out", tmp_path / "out") == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_job_gives_the_published_aurocs(tmp_path: Path, real_data: Path) -> None:
    reference = real_data / "reference_predictions"
    labels = real_data / "Data_Entry_2017_v2020.csv.gz"
    flags = ["--scores", reference / "preds.csv", "--data.labels", labels, "--out", tmp_path, "--evaluate.bootstrap=10"]
    command = [sys.executable, "jobs/evaluate.py", *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    published = pd.read_csv(reference / "aucs.csv").set_index("label")["auc"].to_dict()
    mean = result["auroc"].pop("mean")
    assert result["auroc"] == pytest.approx(published, abs=1e-6)
    assert mean == pytest.approx(sum(published.values()) / 14, abs=1e-6)
    assert (result["n_scored"], result["labels"]["label_version"]) == (22_433, "v2020")
