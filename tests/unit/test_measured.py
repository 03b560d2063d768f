"""A doctor's report as a plan goes by it: whole, with gaps, and none."""

import json
from pathlib import Path
from typing import Any

import pytest

from cxr_dist.errors import DataError
from cxr_dist.measured import MeasuredNode, Measurements, of_ray, read_measurements

REPORT: dict[str, Any] = {
    "format": "cxr-dist/doctor/1",
    "when": "2026-11-24T00:00:00Z",
    "verdict": "ready",
    "problems": [],
    "nodes": [
        {
            "node_id": "ab",
            "host": "h",
            "role": "train",
            "instance_type": "g5.2xlarge",
            "market": "spot",
            "cpus": 8,
            "gpus": 1,
            "gpu_name": "A10G",
            "memory_bytes": 1,
            "object_store_bytes": 9_000_000_000,
            "scratch_free_bytes": 1,
            "versions": {},
            "clock_skew_s": 0.0,
            "store_read_bytes_per_s": 2.5e8,
            "store_write_bytes_per_s": None,
        }
    ],
    "rates": {
        "decode_images_per_s_per_core": {"png": 240.0, "pixels": 4000},
        "train_images_per_s_per_worker": 900.0,
        "prefix_images_per_s_per_worker": 1200.0,
        "allreduce_bytes_per_s": 1e9,
        "backend": "nccl",
    },
}


def read(tmp_path: Path, content: Any) -> Measurements:
    (tmp_path / "doctor.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return read_measurements(str(tmp_path / "doctor.json"))


def test_a_whole_report(tmp_path: Path) -> None:
    found = read(tmp_path, REPORT)
    assert (found.train, found.prefix, found.allreduce_bytes_per_s) == (900.0, 1200.0, 1e9)
    assert found.decode == {"png": 240.0, "pixels": 4000.0}
    assert found.nodes == (
        MeasuredNode(
            instance="g5.2xlarge",
            market="spot",
            role="train",
            cpus=8.0,
            gpus=1.0,
            object_store_bytes=9_000_000_000,
            read_bytes_per_s=2.5e8,
        ),
    )
    assert (found.when, found.verdict) == ("2026-11-24T00:00:00Z", "ready")


def test_what_was_not_measured_is_not_known(tmp_path: Path) -> None:
    rates = {"decode_images_per_s_per_core": {"png": None, "pixels": 4000}, "train_images_per_s_per_worker": None}
    found = read(tmp_path, {"format": "cxr-dist/doctor/1", "rates": rates, "nodes": [{"store_read_bytes_per_s": None}]})
    assert (found.train, found.prefix, found.allreduce_bytes_per_s) == (None, None, None)
    assert found.decode == {"pixels": 4000.0}
    assert found.nodes == (MeasuredNode(),)
    assert read(tmp_path, {"format": "cxr-dist/doctor/1"}).nodes == ()


def with_rate(name: str, value: Any) -> dict[str, Any]:
    return {**REPORT, "rates": {**REPORT["rates"], name: value}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "found no JSON"),
        ("[1]", "found format 'list', expected 'cxr-dist/doctor/1'"),
        ("{}", "found format None"),
        ({**REPORT, "format": "cxr-dist/doctor/2"}, "found format 'cxr-dist/doctor/2'"),
        ({**REPORT, "rates": [1]}, "found rates [1], expected names and numbers"),
        ({**REPORT, "nodes": [1]}, "found another layout"),
        ({**REPORT, "nodes": [{"cpus": [1]}]}, "found another layout"),
        (with_rate("train_images_per_s_per_worker", 0), "found train_images_per_s_per_worker 0, expected a positive"),
        (with_rate("train_images_per_s_per_worker", -3.0), "expected a positive number or null"),
        (with_rate("train_images_per_s_per_worker", "900"), "found train_images_per_s_per_worker '900'"),
        (with_rate("prefix_images_per_s_per_worker", True), "found prefix_images_per_s_per_worker True"),
        (with_rate("allreduce_bytes_per_s", float("inf")), "found allreduce_bytes_per_s inf"),
        (with_rate("decode_images_per_s_per_core", {"png": 0}), "found png 0, expected a positive number"),
    ],
)
def test_a_report_that_is_none_is_named(content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--doctor .*doctor\.json: ") as caught:
        read(tmp_path, content)
    assert message in str(caught.value)


def test_a_report_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.json: found no file; give what"):
        read_measurements(str(tmp_path / "none.json"))


def test_a_node_of_ray_says_what_it_is_and_nothing_measured() -> None:
    node = {
        "Labels": {"cxr-role": "ingest", "cxr-instance": "c6i.4xlarge", "cxr-market": "spot"},
        "Resources": {"CPU": 16.0, "object_store_memory": 7.0},
    }
    expected = MeasuredNode(
        instance="c6i.4xlarge", market="spot", region="r", role="ingest", cpus=16.0, object_store_bytes=7
    )
    assert of_ray(node, "r") == expected
    assert of_ray({}) == MeasuredNode()
