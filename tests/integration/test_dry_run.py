"""A dry run's figures beside what the run then does, with the object store's own count of bytes and rates measured beforehand."""

import dataclasses
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from ray.job_submission import JobStatus

from cxr_dist import storage
from cxr_dist.cli import parse
from cxr_dist.data.manifest import Manifest
from cxr_dist.train.prepare import make_job, prepare_weights, with_defaults
from cxr_dist.train.survey import survey_here
from tests.faultproxy import FaultProxy, fault_proxy
from tests.submitting import run

pytestmark = [pytest.mark.slow, pytest.mark.long]

TOLERANCE = 0.02
"""Part by which the store may have sent more bytes of shards than the plan says: ranges that were asked for twice."""


@pytest.fixture(scope="module")
def counted(full_stack) -> Iterator[FaultProxy]:
    with fault_proxy(full_stack.env["AWS_ENDPOINT_URL"]) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def doctor(train: str, ingested: dict, full_stack, tmp_path_factory) -> str:
    """A doctor's report by hand: a step and a prefix measured in this process, alone."""
    folder = tmp_path_factory.mktemp("doctor")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in full_stack.env.items():
            patch.setenv(name, value)
        words = train.split()[2:]
        config, _ = parse("", argv=[*words, "--train.storage_path", str(folder), "--run.name", "measured"])
        config = with_defaults(config)
        job = dataclasses.replace(make_job(config, Manifest.load(config.data.uri), use_gpu=False), attempt="x")
        prepare_weights(job, resumed=False)
        rates = survey_here(job, True).rates
        assert rates is not None
        report: dict[str, Any] = {
            "format": "cxr-dist/doctor/1",
            "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "verdict": "ready",
            "problems": [],
            "nodes": [
                {
                    "instance_type": "m6i.xlarge",
                    "market": "on-demand",
                    "cpus": 4,
                    "gpus": 0,
                    "store_read_bytes_per_s": None,
                }
            ],
            "rates": {
                "decode_images_per_s_per_core": {"png": None, "pixels": None},
                "train_images_per_s_per_worker": 1 / (rates.prefix + rates.tail),
                "prefix_images_per_s_per_worker": 1 / rates.prefix,
                "allreduce_bytes_per_s": None,
                "backend": "gloo",
            },
        }
        storage.put_atomic("s3://cxr/doctor.json", json.dumps(report).encode())
    return "s3://cxr/doctor.json"


def of_shards(proxy: FaultProxy) -> int:
    """Bytes of the dataset's shards that the store sent until the test scores were there; pictures of a report come later."""
    seen_all = list(proxy.seen)
    scored = next(
        (n for n, seen in enumerate(seen_all) if seen.method == "PUT" and "scores/test.parquet" in seen.path), None
    )
    tables = ("rows.parquet", "row_groups.parquet", "quarantine.parquet")
    return sum(
        seen.body_bytes
        for seen in seen_all[:scored]
        if seen.method == "GET"
        and seen.path.startswith("/cxr/nih/")
        and ".parquet" in seen.path
        and not seen.path.partition("?")[0].endswith(tables)
    )


def test_the_store_sends_what_the_plan_says(jobs, train, ingested, counted, doctor) -> None:
    env = {"AWS_ENDPOINT_URL": counted.url}
    job = run(jobs, f"{train} --run.name foreseen --dry-run --doctor {doctor}", env)
    assert job.status == JobStatus.SUCCEEDED, job.logs[-4000:]
    plan = job.result
    assert of_shards(counted) == 0
    began = time.monotonic()
    real = run(jobs, f"{train} --run.name foreseen", env)
    wall_s = time.monotonic() - began
    assert real.status == JobStatus.SUCCEEDED, real.logs[-4000:]
    assert real.result["steps"] == plan["steps"]["train_left"]
    wanted = sum(plan["read"][name] for name in ("calibration_bytes", "all_epochs_bytes", "test_bytes"))
    assert wanted <= of_shards(counted) <= (1 + TOLERANCE) * wanted
    [way] = plan["ways"].values()
    epochs = real.result["epoch_s"]
    print(f"bytes of shards: {wanted} planned, {of_shards(counted)} sent")
    print(f"an epoch: {way['epoch_s']['low']:.2f} to {way['epoch_s']['high']:.2f} s planned, {epochs} s real")
    print(
        f"all: {plan['seconds']['low']:.1f} to {plan['seconds']['high']:.1f} s planned, {wall_s:.1f} s with start and report"
    )
    print(f"cost: {plan['cost']} planned, {real.result['cost']['node_hours']:.4f} node-hours real")
