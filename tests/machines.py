"""Machines that are none: namespaces of this one, each with its own processes, addresses, /tmp and home, reached by real SSH.

What `ray stop` ends there are Ray's processes of one machine, as on any other; this machine's own are out of its sight.
`python -m tests.machines FOLDER COURSE …` is what `lan` starts as the first process of an outer namespace: when it ends, the
kernel ends every process of every machine. Needs root, `ip`, `sshd` and `rsync`.
"""

import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NET = "10.77.0"
LAPTOP = f"{NET}.1"
SSHD = shutil.which("sshd") or "/usr/sbin/sshd"
APART = ["--mount", "--pid", "--net", "--uts", "--ipc", "--fork", "--kill-child"]
UP_S = 30.0

SSHD_CONFIG = """
Port 22
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
StrictModes no
UsePAM no
PidFile none
AcceptEnv none
Subsystem sftp internal-sftp
"""


def missing() -> str:
    """What this machine lacks for machines; empty if nothing."""
    if os.geteuid() != 0:
        return "namespaces of one's own want root"
    lacking = [name for name in ("ip", "unshare", "rsync", "ssh-keygen") if shutil.which(name) is None]
    lacking += [] if Path(SSHD).exists() else ["sshd"]
    if lacking:
        return f"not found: {', '.join(lacking)} (Debian: apt-get install openssh-server rsync iproute2)"
    probe = "ip link add name b0 type bridge && ip link add v0 type veth peer name v1"
    done = subprocess.run(["unshare", *APART, "sh", "-c", probe], capture_output=True, text=True)
    return f"namespaces are refused here ({done.stderr.strip()[:200]})" if done.returncode else ""


def run(folder: Path, course: Sequence[str], *, timeout_s: float) -> subprocess.CompletedProcess:
    """A command on a machine of its own (`LAPTOP`), from which machines can be started with `machines`."""
    command = ["unshare", *APART, sys.executable, "-m", "tests.machines", str(folder), *course]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s)


def machines(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Start a machine for each name, with sshd; their addresses. To be called in a course alone."""
    addresses = {}
    for number, name in enumerate(names, start=2):
        process = subprocess.Popen(
            ["unshare", *APART, sys.executable, "-m", "tests.machines", str(folder), "--machine", name],
            cwd=ROOT,
            stdout=(folder / f"{name}.log").open("wb"),
            stderr=subprocess.STDOUT,
        )
        inside = _child(process.pid)
        ip("link", "add", f"veth{number}", "type", "veth", "peer", "name", "eth0", "netns", str(inside))
        ip("link", "set", f"veth{number}", "master", "lan", "up")
        for command in (
            f"address add {NET}.{number}/24 dev eth0",
            "link set eth0 up",
            "link set lo up",
            f"route add default via {LAPTOP}",
        ):
            subprocess.run(["nsenter", "--net", "--target", str(inside), "ip", *command.split()], check=True)
        addresses[name] = f"{NET}.{number}"
    for address in addresses.values():
        _until_open(address, 22)
    return addresses


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def _child(pid: int) -> int:
    """The process that `unshare --fork` has made its own namespace for."""
    path, deadline = Path(f"/proc/{pid}/task/{pid}/children"), time.monotonic() + UP_S
    while time.monotonic() < deadline:
        if words := path.read_text().split():
            return int(words[0])
        time.sleep(0.02)
    raise TimeoutError(f"no machine came of process {pid}")


def _until_open(address: str, port: int) -> None:
    deadline = time.monotonic() + UP_S
    while True:
        try:
            socket.create_connection((address, port), timeout=1).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def _own_view(folder: Path, name: str) -> None:
    """Mounts of a machine: its own /tmp (with what this code needs in it), shared memory, home, and list of processes."""
    home = folder / f"home-{name}"
    home.mkdir(exist_ok=True)
    kept = [path for path in (ROOT, Path(sys.prefix), folder) if path.is_relative_to("/tmp")]
    mount("--make-rprivate", "/")
    mount("-t", "tmpfs", "tmpfs", "/mnt")
    for path in kept:
        inside = Path("/mnt") / path.relative_to("/tmp")
        inside.mkdir(parents=True, exist_ok=True)
        mount("--rbind", str(path), str(inside))
    mount("--rbind", "/mnt", "/tmp")
    os.chmod("/tmp", 0o1777)
    mount("-t", "tmpfs", "tmpfs", "/dev/shm")
    mount("-t", "tmpfs", "tmpfs", "/run")
    users = folder / f"passwd-{name}"  # the home that sshd gives root, which may not be hidden: Python may lie in it
    lines = Path("/etc/passwd").read_text().splitlines()
    users.write_text(
        "\n".join(f"root:x:0:0:root:{home}:/bin/bash" if line.startswith("root:") else line for line in lines) + "\n"
    )
    mount("--bind", str(users), "/etc/passwd")
    mount("-t", "proc", "proc", "/proc")
    socket.sethostname(name)
    os.chdir(ROOT)
    os.environ.update(HOME=str(home), PATH=f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}")


def mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True)


def _be_machine(folder: Path, name: str) -> None:
    """The first process of a machine: sshd."""
    _own_view(folder, name)
    (folder / f"home-{name}" / ".bashrc").write_text(f"export PATH={sysconfig.get_path('scripts')}:$PATH\n")
    os.makedirs("/run/sshd", exist_ok=True)
    os.execv(SSHD, [SSHD, "-D", "-e", "-f", str(folder / "sshd_config")])  # noqa: S606


def _be_laptop(folder: Path, course: Sequence[str]) -> int:
    """The first process of the outer namespace: the network, keys, and then the course."""
    _own_view(folder, "laptop")
    ip("link", "set", "lo", "up")
    ip("link", "add", "name", "lan", "type", "bridge")
    ip("address", "add", f"{LAPTOP}/24", "dev", "lan")
    ip("link", "set", "lan", "up")
    for key in ("host_key", "key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
    (folder / "sshd_config").write_text(SSHD_CONFIG.format(folder=folder))
    return subprocess.run([sys.executable, "-m", *course, str(folder)], cwd=ROOT).returncode


def processes() -> Iterator[tuple[int, str]]:
    """Every process of every machine, as the laptop sees them."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                yield int(entry.name), (entry / "comm").read_text().strip()
            except OSError:
                continue


def main(arguments: list[str]) -> int:
    folder, *rest = arguments
    if rest[0] == "--machine":
        _be_machine(Path(folder), rest[1])
    return _be_laptop(Path(folder), rest)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
