"""What becomes of a run whose data is damaged, or damages the processes that read it."""

import io
import json
import os
import shutil
import subprocess
import zlib
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from PIL import Image
from ray.job_submission import JobStatus, JobSubmissionClient

from cxr_dist import storage
from cxr_dist.data.manifest import Manifest
from cxr_dist.data.synth import write_release
from tests.drills.conftest import Drill
from tests.drills.runs import is_the_undisturbed_run, steps_logged
from tests.submitting import Submitted, find, run, submit, wait

pytestmark = pytest.mark.slow

QUICK = "--evaluate.test false"
"""What the damage does, it does in training. (All epochs: each leaves out the few images of its last, partial step.)"""

KILLER = b"this image always kills what decodes it"
ONCE = b"this image kills what decodes it, once"

SITECUSTOMIZE = f"""
import os, signal
import kornia_rs.io
decode = kornia_rs.io.decode_image_png_u8
def guarded(encoded, *args):
    if {KILLER!r} in encoded:
        signal.raise_signal(signal.SIGSEGV)
    if {ONCE!r} in encoded and not os.path.exists(os.environ["KILLED_ONCE"]):
        open(os.environ["KILLED_ONCE"], "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return decode(encoded, *args)
kornia_rs.io.decode_image_png_u8 = guarded
"""
"""A decoder with a fault in it, for every process of a job: a crash on one image, and once a death as for memory on another.
(The crash is this thread's, as a true fault is; a signal to the process may reach another, and this one decodes on.)"""


@pytest.fixture(scope="module")
def local_release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drawn release in a folder that tests may change a copy of."""
    folder = tmp_path_factory.mktemp("release") / "nih"
    write_release(folder, num_patients=80, seed=0, size=128)
    return folder


@pytest.fixture(scope="module")
def s3(full_stack) -> None:
    """This process reads the stack's S3 server too."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in full_stack.env.items():
            patch.setenv(name, value)
        yield


def ingest(jobs: JobSubmissionClient, release: Path, name: str, *flags: str) -> Submitted:
    """Ingest to s3://cxr/NAME."""
    command = (
        f"python jobs/ingest.py --data.release {release} --data.uri s3://cxr/{name} --data.size 64 {' '.join(flags)}"
    )
    return run(jobs, command)


def training_images(name: str, count: int) -> list[str]:
    """Ids of the first training images of the dataset s3://cxr/NAME."""
    return Manifest.load(f"s3://cxr/{name}").rows("train")["image_id"].to_pylist()[:count]


def copied(release: Path, folder: Path) -> Path:
    subprocess.run(["cp", "-r", str(release), str(folder)], check=True)
    return folder


def with_text(encoded: bytes, text: bytes) -> bytes:
    """A PNG with a comment before its end, in a chunk that decoders pass over."""
    chunk = b"tEXtComment\0" + text
    at = len(encoded) - 12
    return (
        encoded[:at] + (len(chunk) - 4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big") + encoded[at:]
    )


def corrupt_images(job: Submitted, client: MlflowClient, name: str, folder: Path) -> dict[str, str]:
    """The finished run's unreadable images and why, as its artifact tells."""
    assert job.status == JobStatus.SUCCEEDED, job.logs[-4000:]
    assert job.result["corrupt_images"], job.logs[-8000:]
    assert not job.result["tracking_missed"], job.logs[-8000:]
    [found] = find(client, name)
    where = download_artifacts(
        run_id=found.info.run_id,
        artifact_path="corrupt_images.json",
        dst_path=str(folder),
        tracking_uri=client.tracking_uri,
    )
    return json.loads(Path(where).read_text())


@pytest.fixture(scope="module")
def shard(jobs: JobSubmissionClient, local_release: Path, s3: None) -> str:
    """URI of a training shard of the dataset s3://cxr/overwritten."""
    job = ingest(jobs, local_release, "overwritten", "--data.encoding pixels")
    assert job.status == JobStatus.SUCCEEDED, job.logs
    manifest = Manifest.load("s3://cxr/overwritten")
    return storage.join(manifest.uri, manifest.splits["train"].shards[0].path)


@pytest.mark.drill(
    "a shard overwritten by other bytes of the same length after the ingest",
    "FAILED, resumable; the shard is named, nothing of it is trained on",
)
def test_shard_overwritten(
    drill: Drill, jobs: JobSubmissionClient, train: str, client: MlflowClient, shard: str
) -> None:
    whole = storage.read_bytes(shard)
    drill.hurt()
    storage.put_atomic(shard, whole[:4000] + os.urandom(len(whole) // 2) + whole[4000 + len(whole) // 2 :])
    command = f"{train} --data.uri s3://cxr/overwritten --run.name drill-shard --train.max_failures 0 {QUICK}"
    job = run(jobs, command)
    storage.put_atomic(shard, whole)
    assert job.status == JobStatus.FAILED
    assert shard.rpartition("/")[2] in job.logs, job.logs[-3000:]
    for found in find(client, "drill-shard"):
        assert found.info.status == "FAILED"
    job = run(jobs, command)
    assert job.status == JobStatus.SUCCEEDED, job.logs[-3000:]
    assert steps_logged(client, "drill-shard") == list(range(1, job.result["steps"] + 1))
    drill.outcome = "FAILED, naming the shard; FINISHED once it was put back"


@pytest.mark.long
@pytest.mark.drill("a shard cut off after the ingest", "refused or FAILED before a step; the shard is named")
def test_shard_cut(drill: Drill, jobs: JobSubmissionClient, train: str, client: MlflowClient, shard: str) -> None:
    whole = storage.read_bytes(shard)
    drill.hurt()
    storage.put_atomic(shard, whole[:-1000])
    job = run(jobs, f"{train} --data.uri s3://cxr/overwritten --run.name drill-cut --train.max_failures 0")
    storage.put_atomic(shard, whole)
    assert job.status == JobStatus.FAILED
    assert shard.rpartition("/")[2] in job.logs, job.logs[-3000:]
    for found in find(client, "drill-cut"):
        assert found.info.status == "FAILED"
    drill.outcome = f"exit code {job.exit_code}, naming the shard"


@pytest.mark.drill(
    "unreadable images, fewer and more than `data.max_corrupt`",
    "fewer: named, masked, the run goes on; more: FAILED, naming some of them",
)
def test_unreadable_images(
    drill: Drill,
    jobs: JobSubmissionClient,
    train: str,
    client: MlflowClient,
    local_release: Path,
    s3: None,
    tmp_path: Path,
) -> None:
    release = copied(local_release, tmp_path / "nih")
    in_place = ingest(jobs, release, "unreadable", "--data.in_place true")
    assert in_place.status == JobStatus.SUCCEEDED, in_place.logs
    hurt = training_images("unreadable", 3)
    drill.hurt()
    for name in hurt:  # as long as before: what is in it is wrong
        path = release / "images" / name
        path.write_bytes(path.read_bytes()[:100] + os.urandom(path.stat().st_size - 100))
    command = f"{train} --data.uri s3://cxr/unreadable --data.encoding png {QUICK}"
    allowed = {"fewer": 0.1, "more": 0.001}
    ids = [
        submit(jobs, f"{command} --run.name drill-{name} --data.max_corrupt {part}") for name, part in allowed.items()
    ]
    job, more = (wait(jobs, job_id) for job_id in ids)
    assert set(corrupt_images(job, client, "drill-fewer", tmp_path)) == set(hurt)
    assert steps_logged(client, "drill-fewer") == list(range(1, job.result["steps"] + 1))
    assert more.status == JobStatus.FAILED
    [found] = find(client, "drill-more")
    assert found.info.status == "FAILED"
    assert "images of an epoch are unreadable" in found.data.tags["failure"]
    assert any(name in found.data.tags["failure"] for name in hurt)
    drill.outcome = "FINISHED with 3 images named; FAILED with 3 where 0.1 % are allowed"


@pytest.mark.drill(
    "an image that kills its decoder (SIGSEGV), a decoding task killed for memory (SIGKILL)",
    "the image is found out, named and masked; the task is done again; the run goes on",
)
def test_image_kills_its_decoder(
    drill: Drill,
    jobs: JobSubmissionClient,
    train: str,
    client: MlflowClient,
    local_release: Path,
    s3: None,
    tmp_path: Path,
) -> None:
    release = copied(local_release, tmp_path / "nih")
    assert ingest(jobs, release, "before", "--data.encoding png").status == JobStatus.SUCCEEDED
    killer, once = training_images("before", 2)
    for name, text in ((killer, KILLER), (once, ONCE)):
        path = release / "images" / name
        path.write_bytes(with_text(path.read_bytes(), text))
        Image.open(io.BytesIO(path.read_bytes())).load()
    assert ingest(jobs, release, "killer", "--data.encoding png").status == JobStatus.SUCCEEDED
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SITECUSTOMIZE)
    env = {"PYTHONPATH": str(tmp_path / "site"), "KILLED_ONCE": str(tmp_path / "killed-once")}
    drill.hurt()
    command = f"{train} --data.uri s3://cxr/killer --data.encoding png --data.max_corrupt 0.1 {QUICK}"
    job = run(jobs, f"{command} --train.epochs 2 --run.name drill-killer", env)
    named = corrupt_images(job, client, "drill-killer", tmp_path)
    assert (tmp_path / "killed-once").exists()
    assert named == {killer: "decoder killed by signal 11"}
    assert steps_logged(client, "drill-killer") == list(range(1, job.result["steps"] + 1))
    drill.outcome = "FINISHED, the one image named; the other trained on"


@pytest.mark.long
@pytest.mark.drill(
    "a full disk where workers keep scratch files and the node's cache",
    "training unharmed; nothing is cached, metrics are sent from memory",
)
def test_scratch_is_full(
    drill: Drill, jobs: JobSubmissionClient, train: str, client: MlflowClient, trained: Submitted, tmp_path: Path
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k,nr_inodes=64", "tmpfs", str(scratch)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"only root may mount a small disk: {mounted.stderr.strip()}")
    try:
        subprocess.run(["dd", "if=/dev/zero", f"of={scratch}/full", "bs=4k"], capture_output=True, check=False)
        assert shutil.disk_usage(scratch).free == 0
        drill.hurt()
        flags = f"--data.cache_dir {scratch}/cache"
        job = run(jobs, f"{train} {flags} --run.name drill-full", {"TMPDIR": str(scratch)})
        is_the_undisturbed_run(job, trained, client, "drill-full")
    finally:
        subprocess.run(["umount", "-l", str(scratch)], check=True)
    drill.outcome = "FINISHED, the same weights, every step logged once"
