"""What a Ray node does before it is taken away: it tells the cluster, and waits for what runs on it to leave.

A Kubernetes pod has this as its `preStop` hook (infra/kubernetes/cluster). When a spot machine's notice, a drain or a smaller
cluster ends the pod, training writes a checkpoint at once and goes on from it elsewhere; a SIGTERM alone would cost the
steps since the last one, and count as a failure. Exit codes: 0 told, 1 not told (the pod ends all the same).
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence

import psutil

__all__ = ["main", "raylet"]

POLL_S = 0.5


def raylet() -> tuple[psutil.Process, dict[str, str]] | None:
    """This node's raylet and the options that it was started with, None where none runs."""
    for process in psutil.process_iter(["name", "cmdline"]):
        if process.info["name"] == "raylet":
            words = [word.lstrip("-").partition("=") for word in process.info["cmdline"][1:]]
            return process, {name: value for name, _, value in words}
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="tell Ray that this node is about to be taken away, and wait")
    parser.add_argument("--grace", type=int, required=True, help="seconds until the node is ended whatever runs on it")
    grace = parser.parse_args(arguments).grace
    deadline = time.monotonic() + grace
    found = raylet()
    if found is None:
        print("drain: found no raylet, expected this node's; nothing is left to tell", file=sys.stderr)
        return 1
    process, options = found
    notice = {
        "address": options["gcs-address"],
        "node-id": options["node_id"],
        "reason": "DRAIN_NODE_REASON_PREEMPTION",
        "reason-message": "its pod is being ended",
        "deadline-remaining-seconds": grace,
    }
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node"]
    # S603: fixed words, and what the raylet's own command line says
    done = subprocess.run([*command, *(f"--{name}={value}" for name, value in notice.items())], check=False)  # noqa: S603
    if done.returncode != 0:
        return 1
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(POLL_S)
    return 0


if __name__ == "__main__":
    sys.exit(main())
