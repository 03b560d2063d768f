"""Every refusal of preflight: its sentence, and the neighbouring case that it lets pass."""

import contextlib
import dataclasses
import json
import os
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cxr_dist import capacity, experiment, preflight
from cxr_dist.config import Config, DataConfig, EvaluateConfig, ModelConfig, TrackingConfig, TrainConfig
from cxr_dist.data.images import PIXELS_VERSION
from cxr_dist.data.manifest import ROW_GROUPS_SCHEMA, Manifest, Shard, Split
from cxr_dist.data.nih import LABELS_SCHEMA, NIH8
from cxr_dist.errors import ConfigError, DataError, InputError
from tests.unit.test_manifest import make_dataset

FINDINGS = NIH8


def _manifest(train: int = 10, validation: int = 4, **positives: int) -> Manifest:
    counts = dict.fromkeys(FINDINGS, 3) | positives

    def split(name: str, rows: int) -> Split:
        return Split(
            shards=(Shard(path=f"{name}/part-00000.parquet", bytes=1, sha256="0" * 64, rows=rows),),
            num_rows=rows,
            num_row_groups=-(-rows // 8),
            patients=rows,
            positives={finding: min(count, rows) for finding, count in counts.items()},
        )

    return Manifest(
        label_set="nih8",
        findings=FINDINGS,
        encoding="pixels",
        size=64,
        pixels_version=PIXELS_VERSION,
        row_group=8,
        in_place=False,
        seed=0,
        validation_fraction=0.2,
        splits={name: split(name, rows) for name, rows in (("train", train), ("validation", validation), ("test", 5))},
        audit={},
        sources={},
        settings={},
        counts={},
        quarantine=(),
    )


def _save(manifest: Manifest, folder: Path) -> str:
    def empty(schema: pa.Schema, rows: int) -> pa.Table:
        return pa.table([pa.nulls(rows, field.type) for field in schema], schema=schema)

    manifest.save(
        str(folder),
        {name: empty(LABELS_SCHEMA, split.num_rows) for name, split in manifest.splits.items()},
        {name: empty(ROW_GROUPS_SCHEMA, split.num_row_groups) for name, split in manifest.splits.items()},
    )
    return str(folder)


def _data(uri: str, **fields: Any) -> Config:
    wanted: dict[str, Any] = {"label_set": "nih8", "size": 64, "encoding": "pixels"} | fields
    return Config(data=DataConfig(uri=uri, **wanted))


def _train(**fields: Any) -> Config:
    return Config(train=TrainConfig(**fields))


def _refused(error: type[InputError], sentence: str, check: Any, *args: Any) -> None:
    with pytest.raises(error) as refused:
        check(*args)
    assert str(refused.value) == sentence


class TestSecrets:
    def test_a_password_is_refused_and_not_repeated(self) -> None:
        config = Config(tracking=TrackingConfig(uri="postgresql://me:hush@db/x"))
        with pytest.raises(ConfigError, match=r"^tracking\.uri: found a credential") as refused:
            preflight.check_secrets(config)
        assert "hush" not in str(refused.value)
        preflight.check_secrets(Config(tracking=TrackingConfig(uri="postgresql://me@db/x")))

    def test_a_key_in_a_query_is_refused(self) -> None:
        config = _train(storage_path="s3://b/runs?access_key=AK&secret_key=SK")
        with pytest.raises(ConfigError, match=r"^train\.storage_path: found a credential"):
            preflight.check_secrets(config)


class _Answer(BaseHTTPRequestHandler):
    """A web server that is no MLflow: /health is fine, everything else is not there."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def other_server() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), _Answer)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def closed_port() -> Iterator[int]:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


class TestTracking:
    def test_sqlite_beside_existing_folder_passes_and_creates_nothing(self, tmp_path: Path) -> None:
        preflight.check_tracking(Config(tracking=TrackingConfig(uri=f"sqlite:///{tmp_path}/runs.db")))
        assert list(tmp_path.iterdir()) == []

    def test_sqlite_in_no_folder(self, tmp_path: Path) -> None:
        config = Config(tracking=TrackingConfig(uri=f"sqlite:///{tmp_path}/none/runs.db"))
        _refused(
            ConfigError,
            f"tracking.uri: found no folder {tmp_path}/none, expected a SQLite file {tmp_path}/none/runs.db; "
            "make its folder or give another",
            preflight.check_tracking,
            config,
        )

    def test_sqlite_that_is_a_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="found a folder"):
            preflight.check_tracking(Config(tracking=TrackingConfig(uri=f"sqlite:///{tmp_path}")))

    def test_sqlite_in_a_folder_without_the_right_to_write(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
        with pytest.raises(InputError, match=f"{tmp_path} may not be written"):
            preflight.check_tracking(Config(tracking=TrackingConfig(uri=f"sqlite:///{tmp_path}/runs.db")))

    def test_no_server(self, closed_port: int) -> None:
        uri = f"http://127.0.0.1:{closed_port}"
        _refused(
            InputError,
            f"tracking.uri: no MLflow server answers at {uri} ([Errno 111] Connection refused); "
            "start it (mlflow server) or correct tracking.uri",
            preflight.check_tracking,
            Config(tracking=TrackingConfig(uri=uri)),
        )

    def test_no_server_where_none_is_required(self, closed_port: int, caplog: pytest.LogCaptureFixture) -> None:
        uri = f"http://127.0.0.1:{closed_port}"
        preflight.check_tracking(Config(tracking=TrackingConfig(uri=uri, required=False)))
        assert "the run begins all the same" in caplog.text

    def test_a_server_that_accepts_and_says_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(experiment, "ANSWER_S", 0.2)
        with socket.create_server(("127.0.0.1", 0)) as silent:
            uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
            with pytest.raises(InputError, match=f"no MLflow server answers at {uri}"):
                preflight.check_tracking(Config(tracking=TrackingConfig(uri=uri)))

    def test_another_web_server(self, other_server: str) -> None:
        with pytest.raises(InputError, match=f"{other_server} does not serve MLflow experiments"):
            preflight.check_tracking(Config(tracking=TrackingConfig(uri=other_server)))

    def test_no_database(self, closed_port: int) -> None:
        config = Config(tracking=TrackingConfig(uri=f"postgresql://me@127.0.0.1:{closed_port}/x"))
        with pytest.raises(
            InputError, match=rf"database postgresql://\*\*\*@127.0.0.1:{closed_port}/x cannot be opened"
        ):
            preflight.check_tracking(config)


class TestStorage:
    def test_writable_folder_is_left_as_it_was(self, tmp_path: Path) -> None:
        preflight.check_storage(_train(storage_path=str(tmp_path / "runs")))
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == []

    def test_nothing_given(self) -> None:
        with pytest.raises(ConfigError, match=r"^train\.storage_path: found nothing"):
            preflight.check_storage(_train())

    def test_a_file_in_the_way(self, tmp_path: Path) -> None:
        (tmp_path / "runs").write_text("")
        with pytest.raises(InputError, match=rf"^train\.storage_path: {tmp_path}/runs cannot be written"):
            preflight.check_storage(_train(storage_path=str(tmp_path / "runs")))


class TestWeights:
    def test_known_names_and_existing_files_pass(self, tmp_path: Path) -> None:
        (tmp_path / "w.pt").write_bytes(b"x")
        for weights in ("imagenet", "random", str(tmp_path / "w.pt")):
            preflight.check_weights(Config(model=ModelConfig(weights=weights)))

    def test_a_misspelt_name(self) -> None:
        _refused(
            ConfigError,
            "model.weights: found nothing at imagnet; did you mean imagenet?",
            preflight.check_weights,
            Config(model=ModelConfig(weights="imagnet")),
        )


class TestDataset:
    def test_the_manifest_is_returned(self, tmp_path: Path) -> None:
        uri = _save(_manifest(), tmp_path)
        assert preflight.check_dataset(_data(uri)).findings == FINDINGS

    @pytest.mark.parametrize(
        ("name", "wanted", "there"), [("label_set", "nih14", "nih8"), ("size", 224, 64), ("encoding", "png", "pixels")]
    )
    def test_another_dataset_than_the_config_says(
        self, name: str, wanted: object, there: object, tmp_path: Path
    ) -> None:
        uri = _save(_manifest(), tmp_path)
        _refused(
            ConfigError,
            f"data.{name}: found {wanted!r}, but the dataset at {uri} was ingested with {there!r}; "
            f"set data.{name} to {there!r}, or ingest again to another data.uri",
            preflight.check_dataset,
            _data(uri, **{name: wanted}),
        )

    def test_pixels_of_another_version(self, tmp_path: Path) -> None:
        uri = _save(dataclasses.replace(_manifest(), pixels_version="grey-0"), tmp_path)
        with pytest.raises(DataError, match="found pixels_version 'grey-0', this version makes '" + PIXELS_VERSION):
            preflight.check_dataset(_data(uri))

    def test_no_uri(self) -> None:
        with pytest.raises(ConfigError, match=r"^data\.uri: found nothing, expected"):
            preflight.check_dataset(_data(""))

    def test_an_empty_prefix(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=f"found nothing under {tmp_path}/none; run jobs/ingest.py"):
            preflight.check_dataset(_data(str(tmp_path / "none")))

    def test_files_but_no_manifest(self, tmp_path: Path) -> None:
        (tmp_path / "a.png").write_bytes(b"")
        with pytest.raises(DataError, match=r"manifest.json: found no manifest"):
            preflight.check_dataset(_data(str(tmp_path)))

    def test_a_future_format(self, tmp_path: Path) -> None:
        uri = _save(_manifest(), tmp_path)
        raw = json.loads((tmp_path / "manifest.json").read_text())
        (tmp_path / "manifest.json").write_text(json.dumps(raw | {"format": 99}))
        with pytest.raises(DataError, match="found manifest format 99"):
            preflight.check_dataset(_data(uri))

    @pytest.mark.parametrize(("train", "validation", "split"), [(0, 4, "train"), (10, 0, "validation")])
    def test_a_split_without_images(self, train: int, validation: int, split: str, tmp_path: Path) -> None:
        uri = _save(_manifest(train, validation), tmp_path)
        with pytest.raises(DataError, match=f"found no images in the {split} split"):
            preflight.check_dataset(_data(uri))


class TestPositives:
    def test_both_kinds_pass(self) -> None:
        preflight.check_positives(_manifest(Mass=1, Nodule=9), _train())

    @pytest.mark.parametrize(("positives", "kind"), [(0, "positives"), (10, "negatives")])
    def test_one_kind_only(self, positives: int, kind: str) -> None:
        manifest = _manifest(Nodule=positives)
        _refused(
            DataError,
            f"Nodule: found no {kind} among the 10 images of the train split, expected at least one; "
            "add Nodule to train.skip_findings or ingest more images",
            preflight.check_positives,
            manifest,
            _train(),
        )
        preflight.check_positives(manifest, _train(skip_findings=("Nodule",)))

    def test_a_finding_that_is_not_there(self) -> None:
        with pytest.raises(ConfigError, match="found 'Nodul', which the dataset has not; did you mean Nodule"):
            preflight.check_positives(_manifest(), _train(skip_findings=("Nodul",)))

    def test_nothing_left(self) -> None:
        with pytest.raises(ConfigError, match="found every finding"):
            preflight.check_positives(_manifest(), _train(skip_findings=FINDINGS))


def _batch(
    global_batch: int,
    workers: int,
    micro: int = 0,
    group: int = 16,
    norm: str = "group",
    trainable: str = "denseblock4",
) -> Config:
    return Config(
        train=TrainConfig(global_batch=global_batch, num_workers=workers, micro_batch=micro),
        model=ModelConfig(bn_group=group, batch_norm=norm, trainable=trainable),  # type: ignore[arg-type]
    )


class TestBatches:
    @pytest.mark.parametrize(
        "config",
        [
            _batch(16, 1),
            _batch(32, 2),
            _batch(64, 2, micro=16),
            _batch(16, 2, group=8),
            _batch(16, 2, norm="frozen"),
            _batch(16, 2, trainable="head"),
            _batch(48, 2, micro=8, norm="frozen"),
        ],
    )
    def test_passes(self, config: Config) -> None:
        capacity.world_sizes(config, 8)

    @pytest.mark.parametrize(
        ("config", "sentence"),
        [
            (
                _batch(40, 2),
                "train.global_batch: found 40 images for 2 workers and row groups of 8, expected a multiple of "
                "8 x 2 = 16; set it to 32 or 48, or keep it with train.num_workers 1 or 5",
            ),
            (
                _batch(10, 1),
                "train.global_batch: found 10 images for 1 worker and row groups of 8, expected a multiple of "
                "8 x 1 = 8; set it to 8 or 16",
            ),
            (
                _batch(8, 2),
                "train.global_batch: found 8 images for 2 workers and row groups of 8, expected a multiple of "
                "8 x 2 = 16; set it to 16, or keep it with train.num_workers 1",
            ),
            (
                _batch(16, 2),
                "model.bn_group: found batch-norm groups of 16 images and a rank's share of 8 (16 / 2 workers), "
                "expected a share of whole groups; set train.global_batch to 32, or model.bn_group to 2, 4 or 8",
            ),
            (
                _batch(64, 1, micro=8),
                "train.micro_batch: found 8 images for a rank's share of 64, expected a divisor of it of whole "
                "batch-norm groups of 16; set it to 16, 32 or 64",
            ),
            (
                _batch(16, 1, micro=3, norm="frozen"),
                "train.micro_batch: found 3 images for a rank's share of 16, expected a divisor of it; "
                "set it to 1, 2, 4, 8 or 16",
            ),
        ],
    )
    def test_refused(self, config: Config, sentence: str) -> None:
        _refused(ConfigError, sentence, capacity.world_sizes, config, 8)

    def test_of_a_range_those_are_kept_that_fit(self) -> None:
        def sizes(*workers: int) -> tuple[int, ...]:
            config = _batch(64, 1, group=8)
            return capacity.world_sizes(
                dataclasses.replace(config, train=dataclasses.replace(config.train, num_workers=workers)), 8
            )

        assert sizes(1, 6) == (1, 2, 4)
        assert sizes(3, 4) == (4,)
        assert sizes(2, 2) == (2,)
        with pytest.raises(ConfigError, match=r"train.global_batch: found 64 images for 5 workers .* or keep it with"):
            sizes(5, 7)

    @example(64, 2, 16, 16, 8)
    @example(64, 2, 8, 16, 8)
    @given(st.integers(1, 96), st.integers(1, 6), st.integers(0, 32), st.integers(2, 16), st.sampled_from((1, 2, 4, 8)))
    def test_passes_exactly_what_can_be_dealt(
        self, batch: int, workers: int, micro: int, group: int, row_group: int
    ) -> None:
        share, part = batch // workers, micro or batch // workers
        dealt = batch % (row_group * workers) == 0 and share % part == 0 and part % group == 0
        config = _batch(batch, workers, micro, group)
        with contextlib.nullcontext() if dealt else pytest.raises(ConfigError):
            capacity.world_sizes(config, row_group)


def _node(address: str, cpus: float, gpus: float = 0) -> dict[str, Any]:
    return {"Alive": True, "NodeManagerAddress": address, "Resources": {"CPU": cpus, "GPU": gpus}}


SERVER = TrackingConfig(uri="http://host:5000")


class TestResources:
    def test_no_cpu_left_for_decoding(self) -> None:
        _refused(
            ConfigError,
            "train.cpus_per_worker: cluster has 2 CPUs, 2 workers x 1 CPU leave 0 for decoding; at least 1 needed: "
            "lower train.cpus_per_worker to 0.5, lower train.num_workers to 1, or add CPUs",
            capacity.check_resources,
            _train(num_workers=2),
            {"CPU": 2.0},
        )
        capacity.check_resources(_train(num_workers=2, cpus_per_worker=0.5), {"CPU": 2.0})

    def test_one_cpu_is_not_enough_for_anything(self) -> None:
        with pytest.raises(ConfigError, match=r"at least 1 needed: add CPUs$"):
            capacity.check_resources(_train(), {"CPU": 1.0})

    def test_decoders_that_were_asked_for(self) -> None:
        config = Config(data=DataConfig(decode_workers=3))
        with pytest.raises(ConfigError, match=r"leave 2 for decoding; at least 3 needed: .*lower data\.decode_workers"):
            capacity.check_resources(config, {"CPU": 3.0})
        capacity.check_resources(config, {"CPU": 4.0})

    @pytest.mark.parametrize("use_gpu", ["yes", "auto"])
    def test_more_workers_than_gpus(self, use_gpu: str) -> None:
        config = _train(num_workers=3, use_gpu=use_gpu)
        _refused(
            ConfigError,
            "train.num_workers: found 3 workers with a GPU each, the cluster has 2 GPUs; "
            "set train.num_workers to at most 2, or train.use_gpu to no, or add nodes",
            capacity.check_resources,
            config,
            {"CPU": 16.0, "GPU": 2.0},
        )
        capacity.check_resources(config, {"CPU": 16.0, "GPU": 3.0})

    def test_gpus_demanded_and_none_there(self) -> None:
        with pytest.raises(ConfigError, match=r"the cluster has 0 GPUs; set train.use_gpu to no"):
            capacity.check_resources(_train(use_gpu="yes"), {"CPU": 16.0})

    @pytest.mark.parametrize(
        ("use_gpu", "gpus", "wanted"),
        [("yes", 0, True), ("auto", 0, False), ("auto", 1, True), ("no", 1, False)],
    )
    def test_wants_gpu(self, use_gpu: str, gpus: int, wanted: bool) -> None:
        assert capacity.wants_gpu(_train(use_gpu=use_gpu), {"CPU": 1.0, "GPU": float(gpus)}) is wanted

    def test_a_worker_is_not_cut_in_two(self) -> None:
        config = dataclasses.replace(_train(num_workers=2, cpus_per_worker=2), tracking=SERVER)
        nodes = [_node("a", 3), _node("b", 1), _node("c", 1)]
        with pytest.raises(ConfigError, match=r"do not fit on nodes of 3, 1, 1 CPUs \(1 left over\)"):
            capacity.check_resources(config, {"CPU": 5.0}, nodes)
        capacity.check_resources(config, {"CPU": 5.0}, [_node("a", 3), _node("b", 2)])

    def test_halves_of_two_nodes_decode_nothing(self) -> None:
        config = dataclasses.replace(_train(num_workers=2, cpus_per_worker=0.75, use_gpu="yes"), tracking=SERVER)
        nodes = [_node("a", 1.5, 1), _node("b", 1.5, 1)]
        with pytest.raises(ConfigError, match="leave 0 whole CPUs for decoding"):
            capacity.check_resources(config, {"CPU": 3.0, "GPU": 2.0}, nodes)
        capacity.check_resources(config, {"CPU": 4.0, "GPU": 2.0}, [*nodes, _node("c", 1)])

    def test_dead_nodes_do_not_count(self) -> None:
        config = dataclasses.replace(_train(), tracking=SERVER)
        dead = _node("b", 64) | {"Alive": False}
        with pytest.raises(ConfigError, match=r"on nodes of 1.5 CPUs leave 0 whole CPUs"):
            capacity.check_resources(config, {"CPU": 2.0}, [_node("a", 1.5), dead])

    def test_a_database_file_is_for_one_machine(self) -> None:
        nodes = [_node("a", 2), _node("b", 2)]
        with pytest.raises(ConfigError, match="found a SQLite file for a cluster of 2 machines"):
            capacity.check_resources(_train(), {"CPU": 4.0}, nodes)
        capacity.check_resources(_train(), {"CPU": 4.0}, [_node("a", 2), _node("a", 2)])


def test_run_gives_the_manifest_or_the_first_refusal(tmp_path: Path) -> None:
    uri = _save(_manifest(), tmp_path / "data")
    config = dataclasses.replace(
        _data(uri),
        train=TrainConfig(storage_path=str(tmp_path / "runs")),
        tracking=TrackingConfig(uri=f"sqlite:///{tmp_path}/runs.db"),
    )
    assert preflight.run(config).findings == FINDINGS
    late = dataclasses.replace(config, train=dataclasses.replace(config.train, global_batch=12))
    with pytest.raises(ConfigError, match=r"^train\.global_batch"):
        preflight.run(late)


BOXES = "Image Index,Finding Label,Bbox [x,y,w,h],,,\n"


def test_boxes_are_of_the_dataset_s_images(tmp_path: Path) -> None:
    manifest, _ = make_dataset(tmp_path)
    file = tmp_path / "boxes.csv"
    config = Config(evaluate=EvaluateConfig(boxes=str(file)))
    preflight.check_boxes(Config(), manifest)
    with pytest.raises(DataError, match=r"evaluate\.boxes .*boxes\.csv: found no file"):
        preflight.check_boxes(config, manifest)
    file.write_text(BOXES + "90000000_000.png,Mass,1,1,5,5\n")
    with pytest.raises(DataError, match=r"found 1 boxes in .*\(first 90000000_000\.png\), none of an image in"):
        preflight.check_boxes(config, manifest)
    file.write_text(BOXES + "90000000_000.png,Mass,1,1,5,5\n00000015_000.png,Mass,1,1,5,5\n")
    preflight.check_boxes(config, manifest)
    file.write_text(BOXES + "00000015_000.png,Mass,1,1,5,five\n")
    with pytest.raises(DataError, match="row 2, column h: found 'five'"):
        preflight.check_boxes(config, manifest)


class TestSecondLabels:
    def test_none_and_a_good_file_pass(self, tmp_path: Path) -> None:
        preflight.check_second_labels(Config())
        (tmp_path / "labels.csv").write_text("image_id,Mass\na.png,1\n")
        preflight.check_second_labels(Config(evaluate=EvaluateConfig(second_labels=f"{tmp_path}/labels.csv")))

    def test_what_cannot_be_read_is_known_before_training(self, tmp_path: Path) -> None:
        config = Config(evaluate=EvaluateConfig(second_labels=f"{tmp_path}/none.csv"))
        with pytest.raises(DataError, match=r"none\.csv: no such file"):
            preflight.check_second_labels(config)
