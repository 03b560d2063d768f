"""What one node says of itself, in an actor on it: versions, GPUs, room, clock, and how fast it reaches the store.

Only the standard library and psutil are imported before a question needs more, so that a node whose image lacks a package
can say which. Every answer is plain values; a question that fails is answered with why.
"""

import concurrent.futures
import contextlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

__all__ = ["PACKAGES", "NodeProbe", "driver_version", "torch_facts"]

PACKAGES = ("torchvision", "mlflow", "pyarrow", "kornia-rs", "numpy")
"""Packages, besides Ray and torch, whose versions must be the same everywhere: they decide pixels, shards and what a
worker can unpickle."""

STREAMS = 4
"""Objects that are written, then read, at once: one connection shows the store's latency, not the node's rate."""

TORCH_S = 120.0
"""Longest that a process may take to import torch and try each GPU, seconds."""

TORCH_PROGRAM = """
import json, torch
found = {"torch": torch.__version__, "cuda": torch.version.cuda, "gpus": [], "broken": []}
if torch.cuda.is_available():
    for index in range(torch.cuda.device_count()):
        try:
            torch.zeros(1, device=f"cuda:{index}").add_(1).item()
            found["gpus"].append(torch.cuda.get_device_name(index))
        except RuntimeError as error:
            found["broken"].append(f"GPU {index}: {str(error).splitlines()[0]}")
print(json.dumps(found))
"""
"""Asked in a process of its own: Ray hides the GPUs from an actor that holds none, and a broken driver may end who asks."""


class NodeProbe:
    """The actor of a node. It holds no CPU, so that it also runs where none is free."""

    def facts(self, cache_dir: str) -> dict[str, Any]:
        """Versions, GPUs as torch sees them, and room on its disks."""
        versions: dict[str, str | None] = {"python": platform.python_version()}
        for name in ("ray", "torch", *PACKAGES):
            versions[name] = _version(name)
        seen = torch_facts() if versions["torch"] else {"error": "torch is not installed"}
        versions["torch"] = seen.get("torch", versions["torch"])
        versions |= {"cuda": seen.get("cuda"), "driver": driver_version()}
        scratch = shutil.disk_usage(tempfile.gettempdir())
        return {
            "host": socket.gethostname(),
            "versions": versions,
            "gpus": seen.get("gpus", []),
            "gpu_errors": [*seen.get("broken", []), *([seen["error"]] if "error" in seen else [])],
            "scratch_free_bytes": scratch.free,
            "scratch_bytes": scratch.total,
            "cache_free_bytes": _free(cache_dir) if cache_dir else None,
            "shm_bytes": shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else None,  # noqa: S108 - no file is made
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        }

    def now(self) -> float:
        """This node's clock."""
        return time.time()

    def reaches(self, tracking_uri: str, dataset_uri: str) -> dict[str, str | None]:
        """Why this node cannot ask the tracking server, or read the dataset's manifest; None where it can."""
        from cxr_dist import storage
        from cxr_dist.data.manifest import MANIFEST
        from cxr_dist.experiment import no_answer

        found: dict[str, str | None] = {"tracking": None, "dataset": None}
        if tracking_uri:
            found["tracking"] = no_answer(tracking_uri)
        if dataset_uri:
            try:
                storage.read_bytes(storage.join(dataset_uri, MANIFEST))
            except Exception as error:  # noqa: BLE001 - whatever it is, it is told
                found["dataset"] = _says(error)
        return found

    def store(self, prefix: str, num_bytes: int) -> dict[str, Any]:
        """Rates at which this node writes and reads `num_bytes` under a prefix, bytes/s; nothing is left of it."""
        from cxr_dist import storage

        part = os.urandom(max(1, num_bytes // STREAMS))  # nothing that a store could compress
        names = [storage.join(prefix, str(number)) for number in range(STREAMS)]
        try:
            storage.put_atomic(storage.join(prefix, "first"), b"connects, and shows whether it may be written")
            with concurrent.futures.ThreadPoolExecutor(STREAMS) as pool:
                write_s = _timed(lambda: list(pool.map(lambda name: storage.put_atomic(name, part), names)))
                read_s = _timed(lambda: _same(pool.map(storage.read_bytes, names), part))
        except Exception as error:  # noqa: BLE001
            return {"error": _says(error)}
        finally:
            for name in (*names, storage.join(prefix, "first")):
                with contextlib.suppress(Exception):  # the driver removes the prefix once more
                    storage.delete(name)
        return {"write": len(part) * STREAMS / write_s, "read": len(part) * STREAMS / read_s}

    def decode(self, encoded: list[bytes], size: int, row_group: int, processes: int) -> dict[str, Any]:
        """Images a second of so many processes at once, from PNG and from pixel shards."""
        from cxr_dist.doctor.decode import rates

        try:
            return rates(encoded, size=size, row_group=row_group, processes=processes)
        except Exception as error:  # noqa: BLE001
            return {"error": _says(error)}


def torch_facts() -> dict[str, Any]:
    """torch's version, the CUDA it was built with, the GPUs that compute; `error` if it cannot even be asked."""
    env = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    try:
        # S603: a fixed program of ours
        done = subprocess.run(  # noqa: S603
            [sys.executable, "-c", TORCH_PROGRAM], env=env, capture_output=True, text=True, timeout=TORCH_S
        )
    except subprocess.TimeoutExpired:
        return {"error": f"torch did not answer within {TORCH_S:g} s"}
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    if done.returncode:
        return {"error": lines[-1] if lines else f"torch ended with {done.returncode}"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if not found["gpus"] and not found["broken"]:  # torch warns of a driver that is missing or too old, and sees no GPU
        found["broken"] = [line for line in lines if "CUDA" in line or "driver" in line][-1:]
    return found


def driver_version(proc: str = "/proc/driver/nvidia/version") -> str | None:
    """Version of the machine's NVIDIA driver, by the kernel or by nvidia-smi; None if there is none."""
    try:
        text = Path(proc).read_text()
    except OSError:
        program = shutil.which("nvidia-smi")
        if program is None:
            return None
        command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            text = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout  # noqa: S603 - fixed words
        except (OSError, subprocess.TimeoutExpired):
            return None
    found = re.search(r"\b\d{3,}\.\d+(?:\.\d+)?\b", text)
    return found[0] if found else None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _free(folder: str) -> int:
    path = Path(folder)
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _same(found: Iterable[bytes], expected: bytes) -> None:
    if any(data != expected for data in found):
        raise OSError("the store gave back other bytes than were written")


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _says(error: BaseException) -> str:
    from cxr_dist.doctor.problems import one_line

    return one_line(error) or type(error).__name__
