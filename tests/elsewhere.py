"""A Python that has this one's packages, but not this project: models must load and answer there."""

import contextlib
import os
import socket
import subprocess
import sysconfig
import urllib.error
import urllib.request
import venv
from collections.abc import Iterator
from pathlib import Path

from cxr_dist.environment import SETTINGS

UVICORN = """#!{python}
import sys
from uvicorn.main import main
sys.exit(main())
"""


def make_elsewhere(folder: Path) -> Path:
    """A virtual environment that sees the packages installed here; its interpreter.

    A .pth file that names a folder adds it to sys.path and runs none of the .pth files in it, which is where an editable
    installation of this project would hook in. `mlflow models serve` starts the first `uvicorn` of the PATH.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    [packages] = (folder / "lib").glob("python*/site-packages")
    (packages / "here.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    python = folder / "bin" / "python"
    (folder / "bin" / "uvicorn").write_text(UVICORN.format(python=python))
    (folder / "bin" / "uvicorn").chmod(0o755)
    found = run_elsewhere(
        python, "import importlib.util as u; print(u.find_spec('torch') and 1, u.find_spec('cxr_dist'))"
    )
    assert found.split() == ["1", "None"], f"the environment finds this project or lacks torch: {found}"
    return python


def clean_env(python: Path) -> dict[str, str]:
    """This process's environment without what leads to the repository."""
    kept = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME")
    }
    return kept | SETTINGS | {"PATH": f"{python.parent}:/usr/bin:/bin", "OMP_NUM_THREADS": "1"}


def run_elsewhere(python: Path, code: str, *arguments: str) -> str:
    """What a program prints there, in an empty working directory of its own."""
    cwd = python.parents[1] / "empty"
    cwd.mkdir(exist_ok=True)
    command = [str(python), "-c", code, *arguments]
    done = subprocess.run(command, cwd=cwd, env=clean_env(python), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@contextlib.contextmanager
def served(python: Path, model: Path, log: Path) -> Iterator[str]:
    """`mlflow models serve` of a model's folder there; the server's address, once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(python), "-m", "mlflow", "models", "serve", "-m", str(model), "--env-manager", "local"]
    command += ["-h", "127.0.0.1", "-p", str(port)]
    cwd = python.parents[1] / "empty"
    cwd.mkdir(exist_ok=True)
    with log.open("w") as out:
        server = subprocess.Popen(
            command, cwd=cwd, env=clean_env(python), stdout=out, stderr=out, start_new_session=True
        )
    try:
        address = f"http://127.0.0.1:{port}"
        _wait(server, address, log)
        yield address
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, 15)
        server.wait(30)


def _wait(server: subprocess.Popen[bytes], address: str, log: Path) -> None:
    """Until /ping answers; a server that ends first fails the test with what it said."""
    while server.poll() is None:
        try:
            with urllib.request.urlopen(f"{address}/ping", timeout=5) as answer:
                assert answer.status == 200
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(0.2)
    raise AssertionError(f"the server ended: {log.read_text()[-4000:]}")
