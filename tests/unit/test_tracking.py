"""The run's life and the metrics journal, on a real SQLite store; servers and signals are in tests/integration."""

import contextlib
import io
import json
import math
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from cxr_dist import tracking, unsent
from cxr_dist.config import Config, RunConfig, TrackingConfig
from cxr_dist.errors import DataError, InputError
from cxr_dist.experiment import PENDING
from cxr_dist.journal import MetricJournal, send_unsent
from cxr_dist.scrub import has_secret, scrub, scrub_items
from cxr_dist.tracking import TrackedRun, open_run


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """URI of a SQLite store whose schema exists."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('store')}/runs.db"
    MlflowClient(uri).search_experiments()
    return uri


@pytest.fixture
def client(store: str) -> MlflowClient:
    return MlflowClient(store)


@pytest.fixture
def run_id(client: MlflowClient) -> str:
    return client.create_run("0").info.run_id


@pytest.fixture
def dead_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Address that refuses connections: bound, so that nobody else takes it, and never listening."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{held.getsockname()[1]}"


def _run(
    store: str,
    tmp_path: Path,
    *,
    run_id: str | None = None,
    required: bool = True,
    folder: str = "",
    **given_: dict[str, object],
) -> TrackedRun:
    config = Config(tracking=TrackingConfig(uri=store, experiment="life", required=required), run=RunConfig(name="one"))
    return open_run(
        config,
        run_id=run_id,
        params=given_.get("params", {}),
        tags=given_.get("tags", {}),
        storage_dir=str(tmp_path),
        folder=folder,
    )


def _history(client: MlflowClient, run_id: str, key: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client.get_metric_history(run_id, key)]


def test_a_block_that_ends_well_is_finished(store: str, client: MlflowClient, tmp_path: Path) -> None:
    with _run(store, tmp_path) as run:
        assert client.get_run(run.run_id).info.status == "RUNNING"
    found = client.get_run(run.run_id)
    assert (found.info.status, found.info.run_name) == ("FINISHED", "one")
    assert found.info.end_time is not None
    assert "failure" not in found.data.tags
    assert run.missed == []


@pytest.mark.parametrize(
    ("raised", "status", "failure"),
    [
        (ValueError("no\nluck"), "FAILED", "no luck"),
        (ValueError(), "FAILED", "ValueError"),
        (InputError("bad"), "FAILED", "bad"),
        (KeyboardInterrupt(), "KILLED", None),
        (SystemExit(1), "KILLED", None),
    ],
)
def test_an_exception_goes_on_and_becomes_the_status(
    raised: BaseException, status: str, failure: str | None, store: str, client: MlflowClient, tmp_path: Path
) -> None:
    run = _run(store, tmp_path)
    with pytest.raises(type(raised)) as seen, run:
        raise raised
    assert seen.value is raised
    found = client.get_run(run.run_id)
    assert found.info.status == status
    assert found.data.tags.get("failure") == failure


def test_sigterm_is_killed_and_the_old_handler_returns(store: str, client: MlflowClient, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    run = _run(store, tmp_path)
    with pytest.raises(SystemExit) as stopped, run:
        signal.raise_signal(signal.SIGTERM)
    assert stopped.value.code == 143
    assert client.get_run(run.run_id).info.status == "KILLED"
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("error", "status"), [(None, "FINISHED"), (RuntimeError("no"), "FAILED"), (SystemExit(1), "KILLED")]
)
def test_the_last_words_are_said_whichever_way_a_run_ends(
    error: BaseException | None, status: str, store: str, client: MlflowClient, tmp_path: Path
) -> None:
    with contextlib.suppress(RuntimeError, SystemExit), _run(store, tmp_path) as run:

        def last_words() -> None:
            run.log_metrics({"cost/usd": 1.5}, step=0)
            run.set_tags({"cost": "1.50 USD"})

        run.at_end = last_words
        if error is not None:
            raise error
    found = client.get_run(run.run_id)
    assert (found.info.status, found.data.tags["cost"]) == (status, "1.50 USD")
    assert _history(client, run.run_id, "cost/usd") == [(0, 1.5)]


def test_last_words_that_fail_change_no_status(store: str, client: MlflowClient, tmp_path: Path) -> None:
    with _run(store, tmp_path) as run:
        run.at_end = lambda: 1 / 0
    assert client.get_run(run.run_id).info.status == "FINISHED"
    assert run.missed == ["what is logged at the end"]


def test_a_handler_set_while_the_run_is_open_stays(store: str, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def of_ray(signum: int, frame: object) -> None:
        raise SystemExit(signum)

    try:
        with _run(store, tmp_path):
            signal.signal(signal.SIGTERM, of_ray)
        assert signal.getsignal(signal.SIGTERM) is of_ray
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_environment_and_mlflows_globals_stay_as_they_were(store: str, tmp_path: Path) -> None:
    before = dict(os.environ)
    with _run(store, tmp_path):
        pass
    assert dict(os.environ) == before


def test_artifacts_lie_beside_the_database(store: str, client: MlflowClient, tmp_path: Path) -> None:
    report = tmp_path / "report"
    report.mkdir()
    (report / "auroc.csv").write_text("finding,auroc\n")
    with _run(store, tmp_path) as run:
        run.log_artifacts(report)
        run.log_artifact(report / "auroc.csv", "copies")
    root = Path(urlsplit(client.get_run(run.run_id).info.artifact_uri).path)
    database = Path(store.removeprefix("sqlite:///"))
    assert root.is_relative_to(database.parent / "runs-artifacts")
    assert (root / "auroc.csv").read_text() == (root / "copies" / "auroc.csv").read_text() == "finding,auroc\n"


def test_a_missing_artifact_is_the_callers_fault(store: str, tmp_path: Path) -> None:
    with _run(store, tmp_path) as run:
        with pytest.raises(FileNotFoundError, match=r"none\.png"):
            run.log_artifact(tmp_path / "none.png")
        with pytest.raises(FileNotFoundError, match="nowhere"):
            run.log_artifacts(tmp_path / "nowhere")


def test_reopened_run_keeps_params_and_tells_what_changed(store: str, client: MlflowClient, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stop"), _run(store, tmp_path, params={"train.lr": 0.1, "same": 1}) as first:
        raise ValueError("stop")
    with _run(store, tmp_path, run_id=first.run_id, params={"train.lr": 0.2, "same": 1, "new": "x"}) as second:
        again = client.get_run(second.run_id)
        assert again.info.status == "RUNNING"
        assert "failure" not in again.data.tags
    assert second.run_id == first.run_id
    found = client.get_run(first.run_id)
    assert found.data.params == {"train.lr": "0.1", "same": "1", "new": "x"}
    assert found.data.tags["params_changed"] == "train.lr: 0.1 -> 0.2"
    assert found.info.status == "FINISHED"


def test_more_params_than_a_request_takes_and_longer_than_mlflow_keeps(
    store: str, client: MlflowClient, tmp_path: Path
) -> None:
    with _run(store, tmp_path) as run:
        run.log_params({f"p{i}": i for i in range(250)} | {"long": "x" * 7000})
    found = client.get_run(run.run_id).data.params
    assert len(found) == 251
    assert found["long"] == "x" * 6000
    assert run.missed == []
    with _run(store, tmp_path, run_id=run.run_id, params={"long": "x" * 7000}):
        pass
    assert "params_changed" not in client.get_run(run.run_id).data.tags


def test_dataset_is_an_input_of_the_run(store: str, client: MlflowClient, tmp_path: Path) -> None:
    with _run(store, tmp_path) as run:
        run.log_dataset("nih14", "ab" * 32, "s3://key:hush@bucket/nih", {"train": {"rows": 7}})
    (given_,) = client.get_run(run.run_id).inputs.dataset_inputs
    assert given_.dataset.name == "nih14"
    assert given_.dataset.digest == "ab" * 18
    assert json.loads(given_.dataset.source) == {"uri": "s3://***@bucket/nih"}
    assert given_.dataset.source_type == "s3"
    assert json.loads(given_.dataset.profile) == {"train": {"rows": 7}}
    assert [(tag.key, tag.value) for tag in given_.tags] == [("mlflow.data.context", "training")]
    assert run.missed == []


def test_driver_metrics_reach_the_run(store: str, client: MlflowClient, tmp_path: Path) -> None:
    with _run(store, tmp_path) as run:
        run.log_metrics({"test/auroc": 0.75}, step=3, epoch=1)
    assert _history(client, run.run_id, "test/auroc") == [(3, 0.75)]
    assert _history(client, run.run_id, "epoch") == [(3, 1.0)]


def test_what_is_counted_in_the_experiment_grows_over_its_runs(
    store: str, client: MlflowClient, tmp_path: Path
) -> None:
    for expected in (1, 2):
        with _run(store, tmp_path) as run:
            run.count_in_experiment("looks", tag="look")
        assert client.get_run(run.run_id).data.tags["look"] == f"number {expected} of this experiment"
    experiment = client.get_run(run.run_id).info.experiment_id
    assert client.get_experiment(experiment).tags["looks"] == "2"


def test_unknown_run_id_and_dead_server_are_refused(store: str, tmp_path: Path, dead_server: str) -> None:
    with pytest.raises(InputError, match="0123456789abcdef"), _run(store, tmp_path, run_id="0123456789abcdef"):
        pass
    with pytest.raises(InputError, match=dead_server), _run(dead_server, tmp_path):
        pass


def test_deleted_experiment_is_named(store: str, client: MlflowClient, tmp_path: Path) -> None:
    client.delete_experiment(client.create_experiment("gone"))
    config = Config(tracking=TrackingConfig(uri=store, experiment="gone"))
    with (
        pytest.raises(InputError, match="'gone' is deleted"),
        open_run(config, run_id=None, params={}, tags={}, storage_dir=str(tmp_path)),
    ):
        pass


def test_a_store_that_fails_does_not_fail_the_job(
    store: str, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise MlflowException("server at postgresql://me:hush@db/x is gone")

    with _run(store, tmp_path) as run:
        monkeypatch.setattr(MlflowClient, "log_batch", refuse)
        run.log_params({"a": 1})
        run.set_tags({"b": 2})
        run.log_metrics({"m": 1.0}, step=1)
        monkeypatch.setattr(run._journal, "_retry_s", 0.0)
        run._journal.close(20)  # type: ignore[union-attr]
    monkeypatch.undo()
    assert sorted(run.missed)[1:] == ["params", "tags"]
    assert sorted(run.missed)[0].startswith("metrics in ")
    assert client.get_run(run.run_id).info.status == "FINISHED"


def test_what_a_server_missed_is_tried_again_at_the_end(
    store: str, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "auroc.csv").write_text("0.8")
    whole = MlflowClient.log_artifacts

    def away(*args: object) -> None:
        raise MlflowException("no route to host")

    with _run(store, tmp_path) as run:
        monkeypatch.setattr(MlflowClient, "log_artifacts", away)
        run.log_artifacts(tmp_path / "report")
        assert len(run.missed) == 1
        monkeypatch.setattr(MlflowClient, "log_artifacts", whole)
    assert run.missed == []
    assert [file.path for file in client.list_artifacts(run.run_id)] == ["auroc.csv"]


def test_a_server_that_is_away_is_only_asked_whether_it_is_back(
    store: str, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    whole = MlflowClient.log_batch

    def away(_: MlflowClient, run_id: str, **__: object) -> None:
        asked.append(run_id)
        raise MlflowException("connection refused")

    with _run(store, tmp_path) as run:
        monkeypatch.setattr(MlflowClient, "log_batch", away)
        monkeypatch.setattr(tracking, "no_answer", lambda uri: f"no MLflow server answers at {uri}")
        for number in range(3):
            run.set_tags({f"tag{number}": number})
        assert len(asked) == 1
        assert run.missed == ["tags"] * 3
        monkeypatch.setattr(MlflowClient, "log_batch", whole)
        monkeypatch.setattr(tracking, "no_answer", lambda uri: None)
    assert run.missed == []
    found = client.get_run(run.run_id)
    assert [found.data.tags[f"tag{number}"] for number in range(3)] == ["0", "1", "2"]
    assert found.info.status == "FINISHED"


def test_what_a_server_missed_for_good_is_kept_with_the_run_and_told_later(
    store: str, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "report" / "figures").mkdir(parents=True)
    (tmp_path / "report" / "figures" / "roc.svg").write_text("<svg/>")
    (tmp_path / "report" / "auroc.csv").write_text("0.8")
    (tmp_path / "notes.txt").write_text("two lines")
    folder = str(tmp_path / "runs" / "one")

    def away(*args: object, **kwargs: object) -> None:
        raise MlflowException("no route to host")

    with _run(store, tmp_path, folder=folder) as run:
        for name in ("log_artifacts", "log_artifact", "log_batch", "log_inputs", "set_experiment_tag"):
            monkeypatch.setattr(MlflowClient, name, away)
        run.log_artifacts(tmp_path / "report")
        run.log_artifact(tmp_path / "notes.txt", "more")
        run.log_params({"lr": 0.1})
        run.set_tags({"split": "official"})
        run.log_dataset("nih", "ab", "s3://bucket/nih", {})
        run.count_in_experiment("looks", tag="look")
    monkeypatch.undo()
    assert len(run.missed) == 6
    (tmp_path / "report" / "auroc.csv").unlink()  # what was kept is a copy
    assert unsent.waits(folder)
    assert unsent.send(folder, store, run.run_id) == 0
    found = client.get_run(run.run_id)
    assert {file.path for file in client.list_artifacts(run.run_id)} == {"auroc.csv", "figures", "more"}
    assert [file.path for file in client.list_artifacts(run.run_id, "more")] == ["more/notes.txt"]
    assert [file.path for file in client.list_artifacts(run.run_id, "figures")] == ["figures/roc.svg"]
    assert found.data.params == {"lr": "0.1"}
    assert found.data.tags["split"] == "official"
    assert found.data.tags["look"].startswith("number ")
    assert found.inputs.dataset_inputs[0].dataset.name == "nih"
    assert not unsent.waits(folder)


def test_a_run_begins_without_a_server_if_it_may(
    store: str, client: MlflowClient, tmp_path: Path, dead_server: str
) -> None:
    folder = str(tmp_path / "runs" / "one")
    with _run(dead_server, tmp_path, required=False, folder=folder, params={"lr": 0.1}) as run:
        assert run.run_id.startswith(PENDING)
        run.log_metrics({"test/auroc": 0.75}, step=3)
    assert run.missed[-1] == "status FINISHED"
    with _run(store, tmp_path, run_id=run.run_id, folder=folder) as again:
        again.send_kept()
    assert not again.run_id.startswith(PENDING)
    found = client.get_run(again.run_id)
    assert (found.info.status, found.info.run_name, found.data.params) == ("FINISHED", "one", {"lr": "0.1"})
    assert found.data.tags["pending_id"] == run.run_id
    assert _history(client, again.run_id, "test/auroc") == [(3, 0.75)]
    with _run(store, tmp_path, run_id=run.run_id) as third:
        assert third.run_id == again.run_id


def test_journal_on_a_full_disk_still_sends(
    client: MlflowClient, store: str, run_id: str, tmp_path: Path, dead_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rank0.jsonl"
    journal = MetricJournal(path, dead_server, run_id)
    journal.log({"loss": 0.9}, step=1)
    whole = path.read_bytes()

    def full(self: io.FileIO, line: bytes) -> int:
        """Half of it fits."""
        return whole_write(self, line[: len(line) // 2])

    class Full(io.FileIO):
        write = full

    whole_write = io.FileIO.write
    journal._file.file = Full(path, "a+")
    journal.log({"loss": 0.8}, step=2)
    assert path.read_bytes() == whole
    journal._file.file = io.FileIO(path, "a+")
    journal.log({"loss": 0.7}, step=3)
    assert [record["step"] for record in journal.unsent_records()] == [1, 2, 3]
    folder = str(tmp_path / "runs" / "one")
    assert unsent.close(journal, folder, 1) == 3
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()[1:]] == [1, 3]
    assert unsent.send(folder, store, run_id) == 3
    assert _history(client, run_id, "loss") == [(1, 0.9), (2, 0.8), (3, 0.7)]


def test_journal_without_a_folder_to_write_in_still_sends(
    client: MlflowClient, store: str, run_id: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    journal = MetricJournal(tmp_path / "file" / "rank0.jsonl", store, run_id)
    journal.log({"loss": 0.9}, step=1)
    assert journal.close(30) == 0
    assert _history(client, run_id, "loss") == [(1, 0.9)]


def test_journal_logs_each_step_once_across_restarts(
    client: MlflowClient, store: str, run_id: str, tmp_path: Path
) -> None:
    path = tmp_path / "rank0.jsonl"
    journal = MetricJournal(path, store, run_id)
    journal.log({"loss": 0.9, "rate": math.nan}, step=1)
    journal.log({"loss": 0.7}, step=2)
    assert journal.close(30) == 0
    with path.open("a") as file:
        file.write('{"step": 3, "timest')
    journal = MetricJournal(path, store, run_id)
    journal.log({"loss": 0.71, "auroc": 0.5}, step=2)
    journal.log({"loss": 0.6}, step=3)
    assert journal.close(30) == 0
    assert [json.loads(line)["metrics"] for line in path.read_text().splitlines()[2:]] == [
        {"loss": 0.7},
        {"auroc": 0.5},
        {"loss": 0.6},
    ]
    elsewhere = MetricJournal(tmp_path / "another_node.jsonl", store, run_id)
    elsewhere.log({"loss": 0.61}, step=3)
    elsewhere.log({"loss": 0.5}, step=4, epoch=2)
    assert elsewhere.close(30) == 0
    assert _history(client, run_id, "loss") == [(1, 0.9), (2, 0.7), (3, 0.6), (4, 0.5)]
    assert _history(client, run_id, "auroc") == [(2, 0.5)]
    assert _history(client, run_id, "epoch") == [(4, 2.0)]
    ((step, rate),) = _history(client, run_id, "rate")
    assert step == 1
    assert math.isnan(rate)


def test_a_dead_server_neither_raises_nor_loses(
    client: MlflowClient, store: str, run_id: str, tmp_path: Path, dead_server: str
) -> None:
    path = tmp_path / "rank0.jsonl"
    journal = MetricJournal(path, dead_server, run_id)
    for step in range(500):
        journal.log({"loss": 1 / (step + 1), "lr": 0.1}, step=step)
    assert journal.close(5) == 500
    assert send_unsent(path, store, run_id) == 1000
    assert send_unsent(path, store, run_id) == 0
    assert _history(client, run_id, "loss") == [(step, 1 / (step + 1)) for step in range(500)]


def test_what_the_server_lacks_goes_on_in_another_journal(
    client: MlflowClient, store: str, run_id: str, tmp_path: Path, dead_server: str
) -> None:
    lost = MetricJournal(tmp_path / "lost.jsonl", dead_server, run_id)
    for step in range(5):
        lost.log({"loss": 1 / (step + 1)}, step=step)
    carried = lost.unsent_records()
    assert [record["step"] for record in carried] == [0, 1, 2, 3, 4]
    assert [record["step"] for record in lost.unsent_records(most=2)] == [3, 4]
    lost.close(1)
    journal = MetricJournal(tmp_path / "rank0.jsonl", store, run_id)
    journal.log({"loss": 0.5}, step=1)  # replayed before
    journal.add(carried)
    journal.log({"loss": 0.2}, step=5)
    assert journal.flush(30) == 0
    assert journal.unsent_records() == []
    assert journal.close(30) == 0
    assert sorted(_history(client, run_id, "loss")) == [(step, 1 / (step + 1)) for step in range(5)] + [(5, 0.2)]
    [first, *_] = client.get_metric_history(run_id, "loss")
    assert first.timestamp == carried[0]["timestamp"]


def test_a_request_that_was_taken_but_not_answered_is_not_sent_twice(
    client: MlflowClient, store: str, run_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = MlflowClient.log_batch
    requests = []

    def lose_the_first_answer(self: MlflowClient, *args: object, **kwargs: object) -> None:
        requests.append(args)
        whole(self, *args, **kwargs)
        if len(requests) == 1:
            raise MlflowException("connection reset")

    monkeypatch.setattr(MlflowClient, "log_batch", lose_the_first_answer)
    journal = MetricJournal(tmp_path / "rank0.jsonl", store, run_id, retry_s=0.0)
    journal.log({"loss": 0.9}, step=1)
    assert journal.close(30) == 0
    assert len(requests) == 1
    assert _history(client, run_id, "loss") == [(1, 0.9)]


def test_journal_of_another_run_or_format_is_refused(store: str, run_id: str, tmp_path: Path) -> None:
    path = tmp_path / "rank0.jsonl"
    MetricJournal(path, store, run_id).close(30)
    with pytest.raises(DataError, match=f"journal of run {run_id}, expected run other"):
        MetricJournal(path, store, "other")
    path.write_text('{"format": "cxr-dist-metrics/9", "run_id": "r"}\n')
    with pytest.raises(DataError, match="found format 'cxr-dist-metrics/9', expected cxr-dist-metrics/1"):
        MetricJournal(path, store, "r")


def test_journal_refuses_a_name_that_mlflow_would(store: str, run_id: str, tmp_path: Path) -> None:
    journal = MetricJournal(tmp_path / "rank0.jsonl", store, run_id)
    with pytest.raises(ValueError, match=r"a\[0\]"):
        journal.log({"a[0]": 1.0}, step=0)
    assert journal.close(30) == 0


def test_planted_secrets_reach_neither_server_nor_files_nor_log(
    store: str, client: MlflowClient, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "hu/sh+1"
    secrets = {"data.uri": f"s3://AKIA:{secret}@bucket/nih", "aws_secret_access_key": secret, "note": f"token={secret}"}

    def refuse(*_: object, **__: object) -> None:
        raise MlflowException(f"cannot put to s3://AKIA:{secret}@bucket/runs")

    monkeypatch.setattr(MlflowClient, "log_inputs", refuse)
    with _run(store, tmp_path, params=secrets, tags=secrets) as run:
        run.log_metrics({"loss": 1.0}, step=0)
        run.log_dataset("nih", "0", secrets["data.uri"], {})
        run.finish("FAILED", str(InputError(f"postgresql://me:{secret}@db:5432/x refused; PGPASSWORD={secret}")))
    data = client.get_run(run.run_id).data
    assert data.params["data.uri"] == "s3://***@bucket/nih"
    assert data.tags["failure"] == "postgresql://***@db:5432/x refused; PGPASSWORD=***"
    journals = [path.read_text() for path in tmp_path.rglob("*.jsonl")]
    assert len(journals) == 1
    assert "lacks dataset" in caplog.text
    assert secret not in json.dumps([data.params, data.tags, journals]) + caplog.text


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("postgresql://u:p@ss@host:5432/db", "postgresql://***@host:5432/db"),
        ("https://ghp_abc@host/x", "https://***@host/x"),
        ("s3://AK:a/b@bucket/x and http://host:5000/y", "s3://***@bucket/x and http://host:5000/y"),
        ("http://host:5000/#/experiments/1", "http://host:5000/#/experiments/1"),
        ("models:/cxr@champion by me@example.org", "models:/cxr@champion by me@example.org"),
        ('{"password": "x y", "aws_secret_access_key": "z"}', '{"password": "*** y", "aws_secret_access_key": "***"}'),
        ("Authorization: Bearer abc.def", "Authorization: ***"),
        ("s3://b/x?access_key=AK&secret_key=SK&region=r", "s3://b/x?access_key=***&secret_key=***&region=r"),
        ("nih8, 0.001", "nih8, 0.001"),
    ],
)
def test_scrub(text: str, clean: str) -> None:
    assert scrub(text) == clean


def test_scrub_items_hides_whole_values_under_secret_names() -> None:
    assert scrub_items({"s3.password": "a b", "api-key": 7, "token": "", "lr": 0.1}) == {
        "s3.password": "***",
        "api-key": "***",
        "token": "",
        "lr": "0.1",
    }


@given(
    st.from_regex(r"[A-Za-z0-9]{1,8}", fullmatch=True),
    st.text(alphabet="abcXYZ019/@:+=.-_%", min_size=1, max_size=24),
    st.from_regex(r"[a-z]{1,8}(:[0-9]{1,5})?(/[a-z]{0,8})?", fullmatch=True),
)
def test_no_password_survives_in_a_url(user: str, password: str, rest: str) -> None:
    assert scrub(f"cannot reach postgresql://{user}:{password}@{rest}") == f"cannot reach postgresql://***@{rest}"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("postgresql://u:p@host/db", True),
        ("s3://AK:12/b@bucket", True),
        ("https://u:p@host:5000", True),
        ("https://ghp_abc@host", True),
        ("s3://b/x?access_key=AK&secret_key=SK", True),
        ("postgresql://u@host/db", False),
        ("http://host:5000/a@b", False),
        ("http://host:5000", False),
        ("sqlite:///runs.db", False),
        ("nih14", False),
    ],
)
def test_has_secret(value: str, expected: bool) -> None:
    assert has_secret(value) is expected
