"""An S3 server of the bench's own: the local stack's, on loopback, on the cores that everything else is measured on."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cxr_dist import storage

__all__ = ["server", "upload"]

log = logging.getLogger(__name__)


@contextmanager
def server(folder: Path) -> Iterator[str | None]:
    """A prefix in a bucket, with the server's settings in the environment; None, and a line in the log, without one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "infra/local/stack.py").exists():
        log.warning("S3 is not measured: the local stack belongs to the repository, not to the installed package")
        yield None
        return
    sys.path.insert(0, str(root))
    try:
        from infra.local.stack import StackError, start
    finally:
        sys.path.remove(str(root))
    try:
        stack = start(folder / "s3", ["s3"])
    except StackError as error:
        log.warning("S3 is not measured: %s", error)
        yield None
        return
    before = dict(os.environ)
    try:
        os.environ.update(stack.env)
        storage.forget_filesystems()
        yield "s3://cxr/bench"
    finally:
        os.environ.clear()
        os.environ.update(before)
        storage.forget_filesystems()
        stack.purge()


def upload(uri: str, to: str) -> str:
    """A local folder's files under another URI, which is returned."""
    for name, _ in storage.list_files(uri):
        storage.upload_atomic(storage.join(uri, name), storage.join(to, name))
    return to
