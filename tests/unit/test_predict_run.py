"""How many actors score, what a failure of theirs is called, and the command line."""

import argparse
import contextlib

import numpy as np
import pyarrow as pa
import pytest

from cxr_dist import spending
from cxr_dist.cli import model_flag
from cxr_dist.config import Config
from cxr_dist.data.rows import OK
from cxr_dist.errors import ConfigError, DataError, RunError
from cxr_dist.predict import run
from cxr_dist.predict.run import _cause, _num_scorers
from cxr_dist.predict.workers import Store
from jobs import predict as job


@pytest.mark.parametrize(("cpus", "scorers"), [(2, 1), (3, 2), (7, 6), (16, 13), (64, 54)])
def test_six_score_for_one_that_decodes(cpus: int, scorers: int) -> None:
    assert _num_scorers({"CPU": cpus}, use_gpu=False) == scorers < cpus
    assert _num_scorers({"CPU": cpus, "GPU": 4}, use_gpu=True) == 4


def told(line: str) -> Exception:
    """What Ray Data makes of an error in an actor."""
    return RuntimeError(
        f"""ray::MapWorker(MapBatches(ScoreParts)).submit() (pid=1, ip=127.0.0.1)
  File "cxr_dist/predict/part.py", line 67, in make_part
    raise RunError(f"x: found a score")
{line}

The above exception was the direct cause of the following exception:

ray.exceptions.UserCodeException: UDF failed to process a data block.
Failed to apply UDF transform after 1/1 attempts (total backoff 0.0s).
To change retry attempts, configure `ray.data.DataContext.get_current()` (`retried_io_errors` for I/O)"""
    )


def test_the_sentence_is_found_in_what_ray_makes_of_it() -> None:
    lost = _cause(told("cxr_dist.errors.DataError: x.png: found no file, expected: one"))
    assert (type(lost), str(lost)) == (DataError, "x.png: found no file, expected: one")
    refused = _cause(told("PermissionError: [Errno 13] denied: 'a.png'"))
    assert isinstance(refused, RunError)
    assert "([Errno 13] denied: 'a.png'); run the same command again" in str(refused)
    for line in ("ZeroDivisionError: division by zero", "numpy.exceptions.AxisError: 3"):
        fault = told(line)
        assert _cause(fault) is fault


@pytest.mark.parametrize("rows", [[1, 2, 3], [0, 1, 3], [4, 5, 8], [0, 1, 2, 3, 4]])
def test_rows_that_are_not_one_part_are_not_stored(tmp_path, rows: list[int]) -> None:
    store = Store(
        out=str(tmp_path), plan_sha256="p", thresholds={"Mass": 0.5}, model_version="m", first_part=2, part_rows=4
    )

    def table(rows: list[int]) -> pa.Table:
        names = [f"{row}.png" for row in rows]
        columns = [
            rows,
            names,
            names,
            pa.array([OK] * len(rows), pa.uint8()),
            pa.array([None] * len(rows), pa.string()),
        ]
        return pa.table(columns, names=["row", "image_id", "uri", "state", "reason"])

    with pytest.raises(RunError, match="found other rows than its own"):
        store.put(table(rows), np.zeros((len(rows), 1), np.float32))
    assert list(tmp_path.iterdir()) == []
    assert store.put(table([4, 5, 6]), np.zeros((3, 1), np.float32)) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["part-00003.parquet"]


def test_model_is_the_jobs_own_flag_and_its_keys_are_the_configs() -> None:
    given = ["--model", "models:/cxr/3", "--model=runs/a", "--model.lse_r", "5", "--out", "--model-uri"]
    assert model_flag(given) == [
        *("--model-uri", "models:/cxr/3", "--model-uri=runs/a", "--model.lse_r", "5", "--out", "--model-uri"),
    ]


RESULT = {
    "out": "o",
    "images": 200,
    "readable": 197,
    "unreadable": 3,
    "unreadable_first": {"a.png": "truncated PNG"},
    "left_out_by_ingest": 2,
    "parts": {"written": 1, "found": 2, "damaged": {"part-00001.parquet": "cannot be read"}},
    "model": {"version": "cxr/3@abc"},
    "thresholds": {"source": "0.5 for every finding, as asked"},
    "scored": 150,
}


def arguments(**changes: object) -> argparse.Namespace:
    given = {"model_uri": "m", "images": "i", "out": "o", "split": None, "thresholds": "youden"}
    return argparse.Namespace(**{**given, "part_images": 0, "scorers": 0, **changes})


def test_what_is_missing_on_the_command_line_is_named() -> None:
    for name, flag in (("model_uri", "--model"), ("images", "--images"), ("out", "--out")):
        with pytest.raises(ConfigError, match=f"{flag}: found nothing, expected a URI"):
            job.main(Config(), arguments(**{name: None}))
    with pytest.raises(ConfigError, match="--scorers: found -1, expected 0 or more"):
        job.main(Config(), arguments(scorers=-1))


def test_many_unreadable_images_are_said_and_no_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "predict", lambda config, **_: dict(RESULT))
    monkeypatch.setattr(spending, "metered", lambda config: contextlib.nullcontext(lambda images: {"images": images}))
    assert job.main(Config(), arguments()) == RESULT | {"cost": {"images": 150}}
    assert capsys.readouterr().out.splitlines() == [
        "model: cxr/3@abc; thresholds: 0.5 for every finding, as asked",
        "197 of 200 images predicted, 1 parts written, 2 found: o",
        "made again: part-00001.parquet: cannot be read",
        "not in the dataset, left out by ingest: 2 images",
        "unreadable: 3 images (1.50%, more than data.max_corrupt = 0.001 of them), each has a row with the reason; first",
        "  a.png: truncated PNG",
    ]
