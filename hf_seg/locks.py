"""Locks that keep a second process out of a place while one writes there.

A lock is the operating system's (`flock`, also over NFS) on a hidden file, so it ends with its holder, however that one
ends. The holder deletes the file at its end; one that a kill leaves behind is free, and deleted by the next holder. A
file system without `flock` gets lock files that only their host can tell are stale; where no lock can be had at all,
the work goes on without, after a warning.
"""

import contextlib
import errno
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from hf_seg.errors import UserError

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)  # what such a file system answers


@contextlib.contextmanager
def try_lock(path: Path) -> Iterator[bool]:
    """Hold a lock file for the block; yields False if another process holds it.

    Folders that did not exist are created, and deleted at the end if nothing else is in them.

    Raises:
        OSError: the file cannot be created.
    """
    from filelock import FileLock, SoftFileLock, Timeout  # not at the top: `--help` does not need it

    created = [each for each in path.parents if not each.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    is_mine = True
    try:
        lock.acquire(timeout=0)
    except Timeout:
        is_mine = False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        logger.warning("%s: no lock (%s); make sure that no other process writes there", path.parent, error.strerror)
    if lock.is_locked and not isinstance(lock, SoftFileLock):  # a soft one names its holder itself
        with contextlib.suppress(OSError):  # a full disk
            path.write_text(f"{os.getpid()}\n{socket.gethostname()}\n")
    try:
        yield is_mine
    finally:
        try:
            if lock.is_locked:
                path.unlink(missing_ok=True)  # while it is held; who has opened it already sees that it is gone
        finally:
            lock.release()
        with contextlib.suppress(OSError):  # they contain something now
            for folder in created:
                folder.rmdir()


@contextlib.contextmanager
def exclusive(folder: Path, path: Path | None = None, *, hint: str = "choose another --output_dir") -> Iterator[None]:
    """Keep other processes from writing to a folder during the block.

    A place where no lock file can be created is not locked: whatever writes there will say what is wrong.

    Args:
        folder: the folder, which may not exist yet.
        path: the lock file; default: `.lock` in the folder.
        hint: what to do other than wait.

    Raises:
        UserError: another process writes there.
    """
    path = folder / LOCK_FILE if path is None else path
    with contextlib.ExitStack() as stack:
        is_mine = True
        with contextlib.suppress(OSError):
            is_mine = stack.enter_context(try_lock(path))
        if not is_mine:
            raise UserError(f"{folder} is in use by another process{_holder(path)}; wait for it, or {hint}")
        yield


def _holder(path: Path) -> str:
    """Return who holds a lock file, as far as it says so."""
    try:
        pid, host, *_ = path.read_text(errors="replace").split()
    except (OSError, ValueError):
        return ""
    if not pid.isdigit():
        return ""
    return f" (pid {pid})" if host == socket.gethostname() else f" (pid {pid} on {host})"
