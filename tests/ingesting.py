"""Ingests of small releases: their config, and programs that are killed in the middle."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from cxr_dist.config import Config, DataConfig

ROOT = Path(__file__).resolve().parents[1]
KILLED = """
import os, signal, sys
import ray
from cxr_dist import storage
from cxr_dist.cli import parse
from cxr_dist.data import ingest, tasks
from cxr_dist.data.manifest import Manifest

point, argv = sys.argv[1], sys.argv[2:]
die = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
if point == "manifest":
    Manifest.save = die
elif point == "cleanup":
    storage.delete_dir = die
else:
    left = [int(point)]
    get = ray.get
    def counted(reference):
        result = get(reference)
        left[0] -= 1
        return result if left[0] else die()
    tasks.ray.get = counted
config, _ = parse("", None, argv)
ray.init(address=os.environ["TEST_RAY"], log_to_driver=False)
ingest.ingest(config)
"""


def options(release: Path | str, uri: Path | str, **changes) -> dict:
    return {"release": str(release), "uri": str(uri), "size": 224, "shard_mb": 1, "row_group": 4, **changes}


def config_of(release: Path | str, uri: Path | str, **changes) -> Config:
    return Config(data=DataConfig(**options(release, uri, **changes)))


def kill_at(cluster: str, point: str, **changes) -> None:
    """An ingest on the cluster whose driver is killed after `point` tasks, or before the manifest or the cleaning up."""
    flags = [f"--data.{name}={value}" for name, value in options(**changes).items()]
    env = {**os.environ, "TEST_RAY": cluster, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, point, *flags], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]


def copy_with(release: Path, to: Path, files: dict[str, bytes]) -> Path:
    """The release with files added or replaced."""
    subprocess.run(["cp", "-r", str(release), str(to)], check=True)
    for name, data in files.items():
        path = to / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return to
