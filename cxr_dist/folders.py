"""Folders that are one user's alone."""

import os
import stat
import tempfile
from pathlib import Path

__all__ = ["private_folder"]


def private_folder(name: str) -> Path:
    """A folder under the system's temporary one that is this user's alone: the same one each time, or, if somebody else has
    made one of that name, a new one. On a disk that takes no more it is not there, which journals do without."""
    folder = Path(tempfile.gettempdir(), name)
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        pass
    except OSError:
        return folder
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        return Path(tempfile.mkdtemp(prefix=f"{name}-"))
    folder.chmod(0o700)
    return folder
