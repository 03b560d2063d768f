"""Ray nodes beside the head of a stack, each with a raylet of its own that can be killed."""

import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from typing import Self

import psutil

from infra.local.parts import environment
from infra.local.processes import free_ports
from infra.local.stack import Stack

PORTS = {
    name: 0
    for name in (
        "dashboard-agent-listen-port",
        "dashboard-agent-grpc-port",
        "runtime-env-agent-port",
        "metrics-export-port",
        "node-manager-port",
        "object-manager-port",
    )
}
UP_S = 120.0

ON_LOOPBACK = """
import os
from ray._private import ray_constants, services
from ray.scripts.scripts import main
ray_constants.ENABLE_RAY_CLUSTER = True
services.get_node_ip_address = lambda address=None: "127.0.0.1"
ray_constants.DEFAULT_RUNTIME_ENV_DIR_NAME = os.environ["NODE_RUNTIME_ENVS"]
main()
"""
"""`ray start` for a second node on a head's machine, which it was not made for: on loopback it refuses, or takes the
machine's other address, and a folder of working directories that two nodes share is emptied by one under the other's jobs."""


class Node:
    """A node of the stack's cluster with so many logical CPUs, up while its `with` block runs; `options` are more of
    `ray start`'s (num_gpus, labels)."""

    def __init__(self, stack: Stack, num_cpus: int, **options: object):
        self.stack, self.num_cpus, self.options = stack, num_cpus, options

    def __enter__(self) -> Self:
        command = [sys.executable, "-c", ON_LOOPBACK, "start", "--block", "--disable-usage-stats"]
        options = {
            "address": self.stack.env["RAY_ADDRESS"],
            "node-ip-address": "127.0.0.1",
            "num-cpus": self.num_cpus,
            "min-worker-port": 0,
            "max-worker-port": 0,
            **free_ports(PORTS),
            **{name.replace("_", "-"): value for name, value in self.options.items()},
        }
        command += [f"--{name}={value}" for name, value in options.items()]
        self.log = tempfile.TemporaryFile()
        self.runtime_envs = tempfile.TemporaryDirectory()
        self.process = subprocess.Popen(
            command,
            env=environment(
                self.stack.env
                | {
                    "PATH": f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}",
                    "NODE_RUNTIME_ENVS": self.runtime_envs.name,
                }
            ),
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.raylet = self._find_raylet()
        return self

    def __exit__(self, *_: object) -> None:
        tree = [self.process, *psutil.Process(self.process.pid).children(recursive=True)]
        for process in tree:
            try:
                process.kill()
            except (psutil.NoSuchProcess, ProcessLookupError):
                continue
        self.process.wait()
        self.log.close()
        self.runtime_envs.cleanup()

    @property
    def node_id(self) -> str:
        """The node's id in its cluster."""
        [found] = {part.partition("=")[2] for part in psutil.Process(self.raylet).cmdline() if "--node_id=" in part}
        return found

    def kill(self) -> None:
        """SIGKILL to the raylet; what ran on the node dies with it."""
        os.kill(self.raylet, signal.SIGKILL)

    def _find_raylet(self) -> int:
        deadline = time.monotonic() + UP_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self._said()
            for child in psutil.Process(self.process.pid).children(recursive=True):
                if child.name() == "raylet":
                    return child.pid
            time.sleep(0.1)
        raise AssertionError(self._said())

    def _said(self) -> str:
        self.log.seek(0)
        return self.log.read().decode(errors="replace")[-4000:]
