"""What `ray job submit --working-dir` would upload, and whether Ray takes it: looked at on the user's own machine.

The rules of what stays at home are Ray's own, called and not copied: its default excludes, `excludes` of the runtime
environment, and every `.gitignore` and `.rayignore` on the way down. This module holds all that the doctor needs of Ray's
private API (2.60) for that. The zip is stored, not compressed, so its size follows from names and sizes; nothing is read
or written.
"""

import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from ray._private import ray_constants
from ray._private.runtime_env import packaging

from cxr_dist.doctor.problems import Problem
from cxr_dist.errors import ConfigError

__all__ = ["LIMIT_BYTES", "Entry", "Upload", "judge", "look", "read_runtime_env"]

LIMIT_BYTES = min(ray_constants.DASHBOARD_CLIENT_MAX_SIZE, packaging.GCS_STORAGE_MAX_SIZE)
"""Largest zip that a head takes from `ray job submit`: its job server's largest request (100 MiB in Ray 2.60), which is
below the largest entry of its key-value store (512 MiB), the only limit that Ray's documentation tells."""

MUCH_BYTES = 10 << 20
"""Size from which it is said what the upload holds: code alone is one or two megabytes."""

SHOWN = 5
"""Largest entries that are named."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A file of the working directory, or a folder right under it with all that would travel."""

    path: str
    bytes: int
    files: int


@dataclass(frozen=True, kw_only=True)
class Upload:
    """What would travel."""

    folder: str
    zip_bytes: int
    files: int
    entries: tuple[Entry, ...]
    """Largest first."""
    seconds: float
    """How long it took to look; Ray looks twice and reads every file."""

    def as_json(self) -> dict[str, Any]:
        shown = [{"path": entry.path, "bytes": entry.bytes, "files": entry.files} for entry in self.entries[:SHOWN]]
        return {"folder": self.folder, "zip_bytes": self.zip_bytes, "files": self.files, "largest": shown}


def read_runtime_env(path: str) -> dict[str, Any]:
    """The runtime environment in a YAML file, as `ray job submit --runtime-env` reads it."""
    try:
        found = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"--runtime-env: {path} cannot be read ({error.strerror}); correct the path") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--runtime-env: {path} is no YAML ({' '.join(str(error).split())}); mend it") from None
    if not isinstance(found or {}, dict):
        raise ConfigError(f"--runtime-env: found {type(found).__name__} in {path}, expected keys such as excludes")
    excludes = (found or {}).get("excludes") or []
    if not isinstance(excludes, list) or not all(isinstance(pattern, str) for pattern in excludes):
        raise ConfigError(f"--runtime-env: excludes of {path} is no list of texts; write a pattern to a line")
    return found or {}


def look(folder: str, excludes: list[str] | None = None) -> Upload:
    """What would travel of a folder, with the `excludes` of a runtime environment. ConfigError if it is no folder."""
    root = Path(folder).absolute()
    if not root.is_dir():
        raise ConfigError(f"--working-dir: found no folder {root}, expected the repository's; correct the path")
    began = time.perf_counter()
    sizes: dict[str, tuple[int, int]] = {}
    zip_bytes = 22  # the end record

    def handler(path: Path) -> None:
        nonlocal zip_bytes
        # as Ray's own: files, and folders that are empty
        if not (path.is_file() or (path.is_dir() and next(path.iterdir(), None) is None)):
            return
        relative = path.relative_to(root)
        size = path.stat().st_size if path.is_file() else 0
        name = len(str(relative).encode()) + (0 if path.is_file() else 1)
        zip_bytes += size + 30 + 46 + 2 * name
        top = relative.parts[0] if relative.parts else "."
        before, files = sizes.get(top, (0, 0))
        sizes[top] = before + size, files + 1

    rules = packaging._get_excludes(root, [*ray_constants.get_runtime_env_default_excludes(), *(excludes or [])])
    ignored = os.environ.get(ray_constants.RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") == "1"
    quiet = logging.getLogger(f"{__name__}.ray")
    quiet.setLevel(logging.WARNING)  # else a line for each ignore file
    packaging._dir_travel(root, [rules], handler, include_gitignore=not ignored, logger=quiet)
    entries = sorted(
        (Entry(path=path, bytes=size, files=files) for path, (size, files) in sizes.items()),
        key=lambda entry: (-entry.bytes, entry.path),
    )
    return Upload(
        folder=str(root),
        zip_bytes=zip_bytes,
        files=sum(entry.files for entry in entries),
        entries=tuple(entries),
        seconds=time.perf_counter() - began,
    )


def judge(upload: Upload, limit_bytes: int = LIMIT_BYTES) -> tuple[list[Problem], list[str]]:
    """Problems, and notes, of an upload."""
    size, largest = megabytes(upload.zip_bytes), ", ".join(map(shown, upload.entries[:SHOWN]))
    if upload.zip_bytes > limit_bytes:
        return [
            Problem(
                check="working_dir",
                found=f"{upload.folder} would travel as a zip of {size} ({upload.files} files: {largest})",
                expected=f"at most {megabytes(limit_bytes)}, which is what Ray's job server takes",
                do="name what is no code under excludes in infra/runtime_env.yaml, or in a .rayignore",
            )
        ], []
    if upload.zip_bytes > MUCH_BYTES:
        return [], [f"{upload.folder} would travel as a zip of {size}, mostly no code: {largest}"]
    return [], []


def shown(entry: Entry) -> str:
    return f"{entry.path} {megabytes(entry.bytes)}" + (f" in {entry.files} files" if entry.files > 1 else "")


def megabytes(count: int) -> str:
    return f"{count / (1 << 20):,.1f} MiB"
