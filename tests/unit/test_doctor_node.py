"""What a node says of itself, asked in this process; and what came of it as the JSON that other jobs read."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cxr_dist.doctor import node as node_module
from cxr_dist.doctor.ask import Answer
from cxr_dist.doctor.node import NodeProbe, driver_version, torch_facts
from cxr_dist.doctor.problems import Problem
from cxr_dist.doctor.report import NodeReport, RanksReport, as_json, decode_rates
from cxr_dist.doctor.table import table


@pytest.mark.parametrize(
    ("text", "version"),
    [
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (dvs)  Tue Sep 23\n"
            "GCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1)\n",
            "580.95.05",
        ),
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\n", "550.54.15"),
        ("something else", None),
    ],
)
def test_the_drivers_version_as_the_kernel_tells_it(tmp_path: Path, text: str, version: str | None) -> None:
    (tmp_path / "version").write_text(text)
    assert driver_version(str(tmp_path / "version")) == version


def test_without_a_driver_nvidia_smi_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert driver_version(str(tmp_path / "none")) is None
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 570.86.10\n")
    program.chmod(0o755)
    assert driver_version(str(tmp_path / "none")) == "570.86.10"


@pytest.mark.parametrize(
    ("program", "found"),
    [
        (
            "import os, json; print(json.dumps({'torch': os.environ.get('CUDA_VISIBLE_DEVICES', 'all'), 'gpus': ['A10G'], 'broken': []}))",
            {"torch": "all", "gpus": ["A10G"], "broken": []},
        ),
        ("raise ImportError('libcudart.so.13: cannot open')", {"error": "ImportError: libcudart.so.13: cannot open"}),
        ("import os; os.abort()", {"error": "torch ended with -6"}),
        ("import time; time.sleep(600)", {"error": "torch did not answer within 0.5 s"}),
        (
            "import sys; print('UserWarning: the NVIDIA driver is too old', file=sys.stderr); print('{\"gpus\": [], \"broken\": []}')",
            {"gpus": [], "broken": ["UserWarning: the NVIDIA driver is too old"]},
        ),
    ],
)
def test_torch_is_asked_in_a_process_that_sees_all_gpus_and_may_die(
    monkeypatch: pytest.MonkeyPatch, program: str, found: dict[str, Any]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # as Ray sets it for an actor without a GPU
    monkeypatch.setattr(node_module, "TORCH_PROGRAM", program)
    if "sleep" in program:
        monkeypatch.setattr(node_module, "TORCH_S", 0.5)
    assert torch_facts() == found


def test_facts_of_an_image_without_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    known = node_module._version
    monkeypatch.setattr(node_module, "_version", lambda name: None if name == "torch" else known(name))
    facts = NodeProbe().facts(str(tmp_path / "not" / "yet"))
    assert facts["versions"]["torch"] is None
    assert facts["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["gpu_errors"] == ["torch is not installed"]
    assert 0 < facts["scratch_free_bytes"] <= facts["scratch_bytes"]
    assert facts["cache_free_bytes"] > 0
    json.dumps(facts)


def test_the_store_is_written_read_and_left_empty(tmp_path: Path) -> None:
    found = NodeProbe().store(str(tmp_path / "node"), 1 << 20)
    assert found.keys() == {"read", "write"}
    assert min(found.values()) > 0
    assert os.listdir(tmp_path / "node") == []


def test_a_store_that_refuses_is_told_and_one_that_lies_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    assert "Not a directory" in NodeProbe().store(str(tmp_path / "file" / "node"), 100)["error"]
    monkeypatch.setattr("cxr_dist.storage.read_bytes", lambda uri: b"other")
    told = NodeProbe().store(str(tmp_path / "node"), 100)
    assert told == {"error": "the store gave back other bytes than were written"}
    assert os.listdir(tmp_path / "node") == []


def test_a_node_that_cannot_read_the_dataset_says_so(tmp_path: Path) -> None:
    found = NodeProbe().reaches("", str(tmp_path))
    assert found["tracking"] is None
    assert "manifest.json" in str(found["dataset"])
    (tmp_path / "manifest.json").write_text("{}")
    assert NodeProbe().reaches("", str(tmp_path)) == {"tracking": None, "dataset": None}


def test_clocks() -> None:
    before = time.time()
    assert before <= NodeProbe().now() <= time.time()


def test_decoding_is_measured_with_processes_that_begin_together(tmp_path: Path) -> None:
    Image.fromarray(np.arange(64 * 64, dtype=np.uint8).reshape(64, 64)).save(tmp_path / "a.png")
    found = NodeProbe().decode([(tmp_path / "a.png").read_bytes()], 32, 8, 2)
    assert found.keys() == {"png", "pixels"}
    assert min(found.values()) > 0


def test_what_cannot_be_decoded_is_told() -> None:
    assert "expected it to be ready" in NodeProbe().decode([b"no image"], 32, 8, 1)["error"]


RAW = {
    "NodeID": "ab12",
    "Alive": True,
    "Resources": {"CPU": 8.0, "GPU": 1.0, "memory": 20e9, "object_store_memory": 8e9, "node:10.0.0.1": 1.0},
    "Labels": {"cxr-role": "train", "cxr-instance": "g5.2xlarge", "cxr-market": "spot", "ray.io/node-id": "ab12"},
}
FACTS = {
    "versions": {
        "python": "3.11.7",
        "ray": "2.60.0",
        "torch": "2.15.0+cu132",
        "mlflow": "3.17.2",
        "cuda": "13.2",
        "driver": "580.1",
    },
    "gpus": ["NVIDIA A10G"],
    "gpu_errors": [],
    "scratch_free_bytes": 90_000_000_000,
    "scratch_bytes": 100_000_000_000,
    "cache_free_bytes": None,
    "shm_bytes": 8_000_000_000,
}


def report(**more: Any) -> NodeReport:
    return NodeReport.of(
        RAW | more,
        name="gpu-1",
        facts=Answer(value=FACTS),
        clock_skew_s=0.002,
        reaches=Answer(value={"tracking": None, "dataset": None}),
        store=Answer(value={"read": 250e6, "write": 120e6}),
        decode=Answer(value={"png": 2000.0, "pixels": 64_000.0}),
    )


def silent() -> NodeReport:
    raw = RAW | {"NodeID": "cd34", "Labels": {}, "Resources": {"CPU": 4.0}}
    return NodeReport.of(raw, name="cpu-1", facts=Answer(error="no answer within 60 s", silent=True))


RANKS = RanksReport(
    backend="nccl",
    hosts=("gpu-1", "gpu-1"),
    train_images_per_s=(900.0, 800.0),
    prefix_images_per_s=(1000.0, 950.0),
    tail_images_per_s=(9000.0, 8000.0),
    share=256,
    gradient_bytes=8_000_000,
    allreduce_bytes_per_s=2e9,
)


def test_the_json_is_what_other_jobs_read() -> None:
    problem = Problem(check="answers", node="cpu-1", found="no answer", expected="one", do="look")
    found = as_json(problems=[problem], notes=["n"], nodes=[report(), silent()], ranks=RANKS)
    assert found.pop("when").endswith("+00:00")
    assert json.loads(json.dumps(found)) == {
        "format": "cxr-dist/doctor/1",
        "verdict": "not ready",
        "problems": [{"check": "answers", "node": "cpu-1", "found": "no answer", "expected": "one", "do": "look"}],
        "notes": ["n"],
        "nodes": [
            {
                "node_id": "ab12",
                "host": "gpu-1",
                "role": "train",
                "instance_type": "g5.2xlarge",
                "market": "spot",
                "region": None,
                "cpus": 8.0,
                "gpus": 1,
                "gpu_name": "NVIDIA A10G",
                "memory_bytes": 20_000_000_000,
                "object_store_bytes": 8_000_000_000,
                "scratch_free_bytes": 90_000_000_000,
                "versions": {
                    "python": "3.11.7",
                    "ray": "2.60.0",
                    "torch": "2.15.0+cu132",
                    "cuda": "13.2",
                    "driver": "580.1",
                    "mlflow": "3.17.2",
                },
                "clock_skew_s": 0.002,
                "store_read_bytes_per_s": 250e6,
                "store_write_bytes_per_s": 120e6,
                "decode_images_per_s": {"png": 2000.0, "pixels": 64_000.0},
            },
            {
                "node_id": "cd34",
                "host": "cpu-1",
                "role": None,
                "instance_type": None,
                "market": None,
                "region": None,
                "cpus": 4.0,
                "gpus": 0,
                "gpu_name": None,
                "memory_bytes": 0,
                "object_store_bytes": 0,
                "scratch_free_bytes": None,
                "versions": {"python": None, "ray": None, "torch": None, "cuda": None, "driver": None},
                "clock_skew_s": None,
                "store_read_bytes_per_s": None,
                "store_write_bytes_per_s": None,
                "decode_images_per_s": None,
            },
        ],
        "rates": {
            "decode_images_per_s_per_core": {"png": 250.0, "pixels": 8000.0},
            "train_images_per_s_per_worker": 800.0,
            "prefix_images_per_s_per_worker": 950.0,
            "tail_images_per_s_per_worker": 8000.0,
            "allreduce_bytes_per_s": 2e9,
            "gradient_bytes": 8_000_000,
            "workers": 2,
            "images_per_step_per_worker": 256,
            "backend": "nccl",
        },
    }
    assert as_json(problems=[], notes=[], nodes=[])["verdict"] == "ready"


def test_rates_that_were_not_measured_are_null() -> None:
    rates = as_json(problems=[], notes=[], nodes=[silent()], ranks=RanksReport(backend="gloo"))["rates"]
    assert rates["decode_images_per_s_per_core"] == {"png": None, "pixels": None}
    assert {name for name, value in rates.items() if value} == {"decode_images_per_s_per_core", "backend"}


def test_rays_own_labels_stand_in_for_ours_and_other_words_for_none() -> None:
    assert report(Labels={"ray.io/market-type": "on-demand"}).market == "on-demand"
    assert report(Labels={"cxr-market": "spot", "ray.io/market-type": "on-demand"}).market == "spot"
    assert report(Labels={"cxr-market": "cheap"}).market is None
    assert report(Labels={"ray.io/availability-region": "eu-west-1"}).region == "eu-west-1"


def test_nodes_of_different_sizes_weigh_by_their_cpus() -> None:
    small = NodeReport(node_id="s", name="s", cpus=2.0, decode_images_per_s={"png": 200.0, "pixels": 1000.0})
    assert decode_rates([report(), small]) == {"png": 2200 / 10, "pixels": 65_000 / 10}


def test_the_table_for_people() -> None:
    problem = Problem(check="answers", node="cpu-1", found="no answer within 60 s", expected="one", do="look")
    assert table([report(), silent()], RANKS, [problem], ["a note"]) == (
        "node   role                   CPUs  GPUs           CUDA, driver  object store  scratch free  clock  store read, write  decode PNG, pixels\n"
        "gpu-1  train g5.2xlarge spot  8     1 NVIDIA A10G  13.2, 580.1   8.0 GB        90.0 GB       +2 ms  250, 120 MB/s      2,000, 64,000 images/s\n"
        "cpu-1  -                      4     0              no answer within 60 s\n"
        "\n"
        "on every node that answers: python 3.11.7, ray 2.60.0, torch 2.15.0+cu132, mlflow 3.17.2, cuda 13.2, driver 580.1\n"
        "2 ranks (2 on gpu-1): 800 images/s each in training steps of 256, 950 in the prefix alone, 8,000 from kept features; "
        "all-reduce of 8.0 MB of gradients over nccl in 4 ms, 2,000 MB/s\n"
        "note: a note\n"
        "\n"
        "NOT READY: 1 problem\n"
        "  answers: cpu-1: no answer within 60 s, expected one; look"
    )
    assert table([], None, [], []) == "READY"
