"""Containers without a container engine: a command in namespaces of its own, as an image's user, on a read-only root.

What an image would hold is this machine's file system with the interpreter of these tests, seen through an overlay that
nobody can write to; what a volume would be is a tmpfs. It needs root, and a kernel that lets one make namespaces.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[1]
USER = 1000
PASSWD = """root:x:0:0:root:/root:/bin/bash
ray:x:1000:1000::/home/ray:/bin/bash
postgres:x:999:999::/var/lib/postgresql:/bin/bash"""
"""The users that the images know."""
SUBNET = "10.77.0"
UP_S = 120.0


def needed() -> None:
    """Skips the test where no namespaces are to be had."""
    programs = [
        name for name in ("unshare", "nsenter", "setpriv", "chroot", "ip", "mount") if shutil.which(name) is None
    ]
    if os.geteuid() != 0 or programs:
        pytest.skip(f"namespaces need root and {', '.join(programs) or 'nothing else'}")
    trial = "ip link add name a0 type bridge && mount -t tmpfs tmpfs /mnt"
    done = subprocess.run(["unshare", "--mount", "--net", "--pid", "--fork", "sh", "-c", trial], capture_output=True)
    if done.returncode != 0:
        pytest.skip(f"this machine makes no namespaces: {done.stderr.decode().strip()}")


def stages() -> dict[str, tuple[str, str]]:
    """Name of every stage of infra/Dockerfile → what it is built from, and its instructions, a line each."""
    text = (ROOT / "infra" / "Dockerfile").read_text()
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    found = re.findall(r"^FROM (\S+) AS (\S+)\n(.*?)(?=^FROM|\Z)", text, re.MULTILINE | re.DOTALL)
    return {name: (base, body) for base, name, body in found}


def image_environment(target: str) -> dict[str, str]:
    """What infra/Dockerfile sets for a target, with what it is built from."""
    env: dict[str, str] = {}
    while target in stages():
        target, body = stages()[target]
        for line in re.findall(r"^ENV (.*)$", body, re.MULTILINE):
            env = dict(word.split("=", 1) for word in shlex.split(line)) | env
    return env


def image_folder(target: str) -> str:
    """The WORKDIR of a target, in which its command and drivers of Ray begin."""
    return re.findall(r"^WORKDIR (.*)$", stages()[target][1], re.MULTILINE)[-1]


def health_check(target: str) -> list[str]:
    """The command of a target's HEALTHCHECK."""
    [command] = re.findall(r"^HEALTHCHECK .* CMD (\[.*\])$", stages()[target][1], re.MULTILINE)
    return json.loads(command)


class Network:
    """A bridge that containers are plugged into, in a namespace: nothing outside of it is reached, or reaches it."""

    def __enter__(self) -> Self:
        self.id = uuid.uuid4().hex[:8]
        self.names: dict[str, str] = {}
        self.stack = contextlib.ExitStack()
        self.switch = self.namespace("switch")
        _ip(self.switch, "link add name br0 type bridge")
        _ip(self.switch, "link set br0 up")
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def namespace(self, name: str) -> str:
        full = f"cxr-{self.id}-{name}"
        subprocess.run(["ip", "netns", "add", full], check=True)
        self.stack.callback(subprocess.run, ["ip", "netns", "delete", full], check=True)
        _ip(full, "link set lo up")
        return full

    def plug(self, name: str) -> str:
        """A namespace for a container of this name, with an address that the others know."""
        address = f"{SUBNET}.{len(self.names) + 2}"
        self.names[name] = address
        namespace = self.namespace(name)
        _ip(self.switch, f"link add name v{len(self.names)} type veth peer name eth0 netns {namespace}")
        _ip(self.switch, f"link set v{len(self.names)} master br0")
        _ip(self.switch, f"link set v{len(self.names)} up")
        _ip(namespace, f"addr add {address}/24 dev eth0")
        _ip(namespace, "link set eth0 up")
        _ip(namespace, f"route add default via {SUBNET}.1")  # Ray finds its own address by a route
        return namespace


def _ip(namespace: str, words: str) -> None:
    subprocess.run(["ip", "-n", namespace, *words.split()], check=True)


class Container:
    """A command that runs while the `with` block does, with these variables and writable folders and no others.

    Other containers that it has to find by name must be plugged in before it starts.
    """

    def __init__(
        self,
        network: Network,
        name: str,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        writable: Sequence[str],
        files: Mapping[str, Path] | None = None,
        user: int = USER,
        folder: str = "/home/ray",
    ):
        self.name, self.user, self.folder = name, user, folder
        self.namespace = network.plug(name) if name not in network.names else f"cxr-{network.id}-{name}"
        self.address = network.names[name]
        programs = str(Path(sys.executable).parent)
        self.env = {"PATH": f"{programs}:/usr/bin:/bin", "HOME": "/home/ray"} | dict(env)
        self.files = {"/app/" + part: ROOT / part for part in ("cxr_dist", "jobs", "infra/drain.py")} | dict(
            files or {}
        )
        self.command, self.writable, self.network = list(command), list(writable), network

    def __enter__(self) -> Self:
        self.log, self.box = tempfile.NamedTemporaryFile(suffix=".log"), tempfile.TemporaryDirectory(prefix=self.name)
        begin = ["unshare", "--mount", "--pid", "--ipc", "--uts", "--fork", "--kill-child", "--propagation", "private"]
        self.process = subprocess.Popen(
            ["ip", "netns", "exec", self.namespace, *begin, "bash", "-euc", self._script()],
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            env={"PATH": os.environ["PATH"]},
        )
        self.wait(lambda: self._first() is not None or self.process.poll() is not None)
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            for first in psutil.Process(self.process.pid).children():
                first.kill()  # and with it all processes of its namespace; it has outlived --kill-child by changing its user
        self.process.kill()
        self.process.wait()
        self.log.close()
        self.box.cleanup()

    def run(
        self, command: Sequence[str], env: Mapping[str, str] | None = None, timeout: float = 120
    ) -> subprocess.CompletedProcess[str]:
        """Another command in the running container, as its user: what `docker exec`, a probe or a hook is."""
        first = self._first()
        assert first is not None, self.said()
        enter = ["nsenter", f"--target={first.pid}", "--all", "--root", "--wd"]
        return subprocess.run(
            [*enter, *self._as_user(env), *command],
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
        )

    def wait(self, well: Callable[[], bool]) -> None:
        """Until `well`; the container must not end meanwhile."""
        deadline = time.monotonic() + UP_S
        while not well():
            assert self.process.poll() is None, f"{self.name} ended with {self.process.returncode}: {self.said()}"
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.2)

    def _first(self) -> psutil.Process | None:
        """The container's first process, once it is the user's."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children():
                if child.uids().real == self.user:
                    return child
        return None

    def ended(self) -> int:
        """The exit code of a command that ends by itself."""
        return self.process.wait(UP_S)

    def said(self) -> str:
        return Path(self.log.name).read_text(errors="replace")[-6000:]

    def _as_user(self, env: Mapping[str, str] | None = None) -> list[str]:
        rights = [f"--reuid={self.user}", f"--regid={self.user}", "--clear-groups", "--no-new-privs"]
        variables = [f"{name}={value}" for name, value in (self.env | dict(env or {})).items()]
        inside = ["env", "-i", f"--chdir={self.folder}", *variables]
        return ["setpriv", *rights, "--bounding-set=-all", "--inh-caps=-all", *inside]

    def _script(self) -> str:
        hosts = "\n".join(
            f"{address} {name}" for name, address in ({"localhost": "127.0.0.1"} | self.network.names).items()
        )
        interpreters = {sys.prefix, sys.base_prefix}
        lines = [
            f"mount -t tmpfs tmpfs {self.box.name} && cd {self.box.name} && mkdir up work root && root=$PWD/root",
            "mount -t overlay overlay -o lowerdir=/,upperdir=up,workdir=work root",
            # links such as /var/run are those of the root inside
            'at() { echo "$root$(chroot $root realpath --canonicalize-missing "$1")"; }',
            f"printf '%s\\n' {shlex.quote(hosts)} > root/etc/hosts",
            f"printf '%s\\n' {shlex.quote(PASSWD)} > root/etc/passwd",
            "echo 'nameserver 127.0.0.1' > $(at /etc/resolv.conf)",  # nobody is there: other names are refused at once
            "mkdir -p root/app/infra root/home/ray && mount -t proc proc root/proc",
            "mount --rbind /dev root/dev && mount --rbind /sys root/sys",
            *(f"chmod o+x root{parent}" for prefix in interpreters for parent in list(Path(prefix).parents)[:-1]),
            *(f"if [ -d {s} ]; then mkdir -p root{t}; else touch root{t}; fi" for t, s in self.files.items()),
            *(f"mount --bind {source} root{target}" for target, source in self.files.items()),
            *(f"mkdir -p $(at {one}) && mount -t tmpfs -o mode=1777 tmpfs $(at {one})" for one in self.writable),
            # an interpreter under /tmp would be hidden by now
            *(f"mkdir -p root{prefix} && mount --bind {prefix} root{prefix}" for prefix in interpreters),
            *(f"mount -o remount,ro,bind root{target}" for target in (*self.files, *interpreters)),
            "mount -o remount,ro root",
            f"exec chroot root {shlex.join([*self._as_user(), *self.command])}",
        ]
        return "\n".join(lines)
