"""Secrets that are planted where users have them, looked for wherever a job writes: terminal, log, files, MLflow's store."""

import json
import logging
import os
import re
import runpy
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from cxr_dist.cli import ScrubbedFormatter, run_job
from cxr_dist.config import Config, TrackingConfig, flatten
from cxr_dist.errors import RunError
from cxr_dist.scrub import HELD, has_secret, scrub
from cxr_dist.tracking import open_run
from tests.releases import write_release

ROOT = Path(__file__).resolve().parents[2]

SECRET = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYPLANTED"
QUOTED = "wJalrXUtnFEMI%2FK7MDENG%2BbPxRfiCYPLANTED"
PARTS = ("wJalrXUtnFEMI", "K7MDENG", "PLANTED")
"""What is looked for: no piece of it is anywhere else."""


def pieces(text: str | bytes) -> list[str]:
    shown = text.decode("latin-1") if isinstance(text, bytes) else text
    return [part for part in PARTS if part in shown]


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The secret, in every variable that holds one."""
    for name in HELD:
        monkeypatch.setenv(name, SECRET)


Shown = tuple[int, str]


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., Shown]:
    """Runs a job's command line in an empty folder: its exit code and all that it printed."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *argv: str) -> Shown:
        script = runpy.run_path(str(ROOT / "jobs" / f"{name}.py"))
        extra = script.get("add_flags") or script.get("flags")
        words = script.get("model_flag", list)(list(argv))
        with pytest.raises(SystemExit) as ended:
            run_job(script["main"], description=script["__doc__"], extra=extra, argv=words)
        shown = capfd.readouterr()
        return int(ended.value.code or 0), shown.out + shown.err

    return run


IN_URIS = [
    ("ingest", "--data.uri", f"s3://AKIA:{SECRET}@bucket/x"),
    ("ingest", "--data.release", f"s3://bucket/x?access_key=AKIA&secret_key={SECRET}"),
    ("evaluate", "--checkpoint", f"s3://AKIA:{SECRET}@bucket/run"),
    ("evaluate", "--validation-scores", f"https://bucket.example/x.csv?X-Amz-Signature={SECRET}"),
    ("evaluate", "--data.labels", f"https://:{SECRET}@host/labels.csv"),
    ("gc", "--tracking.uri", f"postgresql://me:{SECRET}@db:5432/mlflow"),
    ("sync", "--tracking.uri", f"https://{SECRET.replace('/', '-')}@mlflow"),
    ("predict", "--images", f"s3://AKIA:{SECRET}@bucket/pngs"),
    ("predict", "--model", f"gs://me:{SECRET}@bucket/run"),
    ("train", "--train.storage_path", f"s3://AKIA:{SECRET}@bucket/runs"),
    ("train", "--model.weights", f"https://host/w.pt?token={SECRET}"),
    ("bench", "decode", "--out", f"s3://AKIA:{SECRET}@bucket/x"),
]


@pytest.mark.parametrize("argv", IN_URIS, ids=lambda argv: f"{argv[0]} {argv[-2]}")
def test_every_job_refuses_a_credential_before_it_does_anything(
    job: Callable[..., Shown], tmp_path: Path, argv: tuple[str, ...]
) -> None:
    code, shown = job(*argv)
    flag = argv[-2] if argv[-2] != "--model" else "--model-uri"
    assert code == 2
    assert re.fullmatch(
        rf"error: (--)?{flag.removeprefix('--')}: found a credential in .*\*\*\*.*, expected none; .*\n", shown
    )
    assert pieces(shown) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "argv",
    [
        ("--data.size", f"s3://AKIA:{SECRET}@bucket"),
        (f"s3://AKIA:{SECRET}@bucket/x",),
        ("--data.url", f"s3://AKIA:{SECRET}@bucket/x"),
        (f"--data.url=s3://AKIA:{SECRET}@bucket/x",),
        ("--run.name", f"password={SECRET}"),
        ("--config", f"s3://AKIA:{SECRET}@bucket/x.yaml"),
    ],
)
def test_no_error_of_the_command_line_repeats_one(job: Callable[..., Shown], argv: tuple[str, ...]) -> None:
    code, shown = job("evaluate", *argv)
    assert code == 2
    assert shown.startswith("error: ")
    assert pieces(shown) == []


def test_a_file_of_a_run_may_hold_one_as_little(job: Callable[..., Shown], tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"train: s3://AKIA:{SECRET}@bucket\n")
    assert pieces(job("train", "--config", str(path))[1]) == []
    path.write_text(f"data: {{uri: 's3://AKIA:{SECRET}@bucket'}}\n")
    code, shown = job("train", "--config", str(path))
    assert code == 2
    assert "data.uri: found a credential in s3://***@bucket" in shown
    assert pieces(shown) == []


def test_a_printed_config_shows_none_and_is_refused_when_read(job: Callable[..., Shown], tmp_path: Path) -> None:
    argv = [f"--data.uri=s3://AKIA:{SECRET}@b/x", f"--tracking.uri=postgresql://me:{SECRET}@db/x", "--print_config"]
    code, shown = job("train", *argv)
    assert code == 0
    assert pieces(shown) == []
    assert yaml.safe_load(shown)["data"]["uri"] == "s3://***@b/x"
    code, shown = job("train", "--data.uri", "s3://bucket/x", "--print_config")
    assert yaml.safe_load(shown)["data"]["uri"] == "s3://bucket/x"


@pytest.mark.usefixtures("planted")
@pytest.mark.parametrize("form", [SECRET, QUOTED])
def test_what_the_environment_holds_is_hidden_in_any_form(form: str) -> None:
    text = f"InvalidRequest: the client said {form}, which is wrong"
    assert scrub(text) == "InvalidRequest: the client said ***, which is wrong"
    assert has_secret(f"runs-{form}")
    assert not has_secret("runs")
    formatter = ScrubbedFormatter("%(message)s")
    try:
        raise RunError("training failed") from ValueError(text)
    except RunError:
        record = logging.makeLogRecord({"msg": "failed: %s", "args": (text,), "exc_info": sys.exc_info()})
    shown = formatter.format(record)
    assert "ValueError: InvalidRequest" in shown
    assert pieces(shown) == []


def test_a_short_value_of_the_environment_hides_no_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGPASSWORD", "test")
    assert scrub("the test split") == "the test split"
    monkeypatch.delenv("PGPASSWORD")
    assert scrub("the test split") == "the test split"


@pytest.mark.usefixtures("planted")
def test_mlflows_store_holds_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise MlflowException(f"the proxy says {SECRET}")

    store = f"sqlite:///{tmp_path}/m.db"
    config = Config(tracking=TrackingConfig(uri=store))
    told: dict[str, Any] = {"note": f"signed with {SECRET}", "uri": f"s3://AKIA:{SECRET}@bucket", "quoted": QUOTED}
    tracked = open_run(
        config,
        run_id=None,
        params=flatten(config) | told,
        tags=told,
        storage_dir=str(tmp_path / "j"),
        folder=str(tmp_path),
    )
    monkeypatch.setattr(MlflowClient, "log_inputs", refuse)
    with tracked as run:
        run.log_dataset("nih", "0", told["uri"], {})
        run.log_metrics({"loss": 1.0}, step=0)
        run.__exit__(ValueError, ValueError(f"cannot read with {SECRET}"), None)
    tags = MlflowClient(store).get_run(run.run_id).data.tags
    assert (tags["failure"], tags["note"]) == ("cannot read with ***", "signed with ***")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"m.db", "writes.json"} <= {path.name for path in files}
    assert {path.name: found for path in files if (found := pieces(path.read_bytes()))} == {}
    assert "lacks dataset" in caplog.text
    assert pieces(caplog.text) == []


class Repeating(BaseHTTPRequestHandler):
    """A store that refuses, and repeats to the client what it knows of it."""

    def do_GET(self) -> None:
        body = f"<Error><Code>AccessDenied</Code><Message>no right with {SECRET}</Message></Error>".encode()
        self.send_response(403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def refusing() -> Iterator[str]:
    """Endpoint of such a store."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Repeating)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_a_job_of_its_own_process_leaves_none(tmp_path: Path, refusing: str) -> None:
    """With every credential in the environment: a report, and then a store that refuses."""
    write_release(tmp_path / "release", num_patients=16, per_patient=1, side=16)
    labels = tmp_path / "release" / "Data_Entry_2017.csv"
    names = [line.split(",")[0] for line in labels.read_text().splitlines()[1:]]
    scores = "image_id,Mass\n" + "".join(f"{name},0.{number:02d}\n" for number, name in enumerate(names))
    (tmp_path / "scores.csv").write_text(scores)
    env = os.environ | dict.fromkeys(HELD, SECRET) | {"AWS_ACCESS_KEY_ID": "AKIA", "AWS_REGION": "us-east-1"}
    env |= {"AWS_ENDPOINT_URL": refusing, "PYTHONPATH": str(ROOT)}

    def evaluate(uri: str) -> Shown:
        command = [sys.executable, str(ROOT / "jobs" / "evaluate.py"), "--scores", uri, "--evaluate.bootstrap", "10"]
        options = ["--data.labels", str(labels), "--json", "result.json"]
        done = subprocess.run([*command, *options], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        return done.returncode, done.stdout + done.stderr

    code, shown = evaluate("scores.csv")
    assert code == 0, shown
    assert pieces(shown) == []
    assert "auroc" in json.loads((tmp_path / "result.json").read_text())
    code, shown = evaluate("s3://bucket/scores.csv")
    assert (code, pieces(shown)) == (2, [])
    assert "s3://bucket/scores.csv: access was refused" in shown
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name: found for path in files if (found := pieces(path.read_bytes()))} == {}
    assert (tmp_path / "outputs" / "evaluate").stat().st_mode & 0o777 == 0o700
