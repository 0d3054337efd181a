"""Files and folders that appear atomically, and their checksums.

A file is written under a temporary name beside its place, flushed to the disk and renamed, so that neither a kill nor a
power cut nor a full disk leaves half of it under its name. What cannot be written or read is a `FileError`. What a
reader finds while something is replaced, or after a kill:

    a file             the old one or the new one
    `atomic_folder`    the same, on Linux; where the system cannot exchange two folders, there is an instant without
                       either, and after a kill just then the next writer restores the old one from `.replaced.NAME`
    `atomic_update`    the old entries; from the instant on when all new ones are on the disk, `finish_update` leads to
                       the new ones, even after a kill, and a reader that does not call it may find no `last`

The next writer deletes temporary files and folders that a kill left. Two processes cannot write to one folder at once:
the second one is refused.
"""

import ctypes
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hf_seg.errors import DISK_HINT, file_errors
from hf_seg.locks import exclusive, try_lock

_BUSY_HINT = "choose another folder"
_COMPLETE, _PLAN, _UPDATE_LOCK = ".complete", ".plan.json", ".update.lock"


def temporary_path(path: Path) -> Path:
    """Return the hidden temporary name of a file or folder, in the same folder; the suffix stays."""
    return path.with_name(f".partial.{path.name}")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path; what the block writes there replaces `path` if it ends without an error."""
    temporary = temporary_path(path)
    with file_errors(path, "cannot be written", DISK_HINT):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            flush(temporary)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a file atomically; text as UTF-8."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty temporary folder that replaces `folder` if the block ends without an error.

    Raises:
        UserError: another process is writing it.
    """
    temporary = temporary_path(folder)
    lock = exclusive(folder, temporary.with_name(f"{temporary.name}.lock"), hint=_BUSY_HINT)
    with file_errors(folder, "cannot be written", DISK_HINT), lock:
        restore(folder)
        with _temporary_folder(temporary):
            yield temporary
            _flush_all(temporary)
            _put_in_place(temporary, folder)
        restore(folder)


def _put_in_place(temporary: Path, folder: Path) -> None:
    """Replace a folder; after an error it is the old one again."""
    had_one, replaced = folder.exists(), _replaced_path(folder)
    try:
        if not had_one:
            os.replace(temporary, folder)
        elif not _exchange(temporary, folder):
            os.replace(folder, replaced)
            os.replace(temporary, folder)
        flush(folder.parent)
    except OSError:
        if replaced.exists():
            remove(folder)
            os.replace(replaced, folder)
        elif had_one:
            _exchange(temporary, folder)
        else:
            remove(folder)
        raise


def restore(folder: Path) -> None:
    """Give a folder back its name that a killed run was about to replace, or delete it if it has been replaced."""
    replaced = _replaced_path(folder)
    if replaced.exists() and not folder.exists():
        os.replace(replaced, folder)
    remove(replaced)


def _replaced_path(folder: Path) -> Path:
    return folder.with_name(f".replaced.{folder.name}")


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two files or folders in one step; False where the system or the file system cannot."""
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    return rename is not None and rename(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0


@contextmanager
def atomic_update(folder: Path, *, first: Iterable[str] = (), last: str = "") -> Iterator[Path]:
    """Yield an empty temporary folder whose entries replace those of the same name in `folder`; other entries stay.

    Nothing is replaced before all new entries are on the disk. Then each entry is replaced atomically, but not all at
    once. So that no mixture of old and new entries is taken for complete, the entries `first` are deleted before the
    others are replaced, and `last` is written at the end. `finish_update` finishes what a kill interrupts there.

    Raises:
        UserError: another process is writing to the folder.
    """
    temporary = folder / ".partial"
    with file_errors(folder, "cannot be written", DISK_HINT), exclusive(folder, folder / _UPDATE_LOCK, hint=_BUSY_HINT):
        _move_entries(folder)
        with _temporary_folder(temporary):
            yield temporary
            entries = sorted((entry.name for entry in temporary.iterdir()), key=lambda name: (name == last, name))
            (temporary / _PLAN).write_text(json.dumps({"first": [*first], "entries": entries}), encoding="utf-8")
            _flush_all(temporary)
            os.replace(temporary, folder / _COMPLETE)
            flush(folder)
        _move_entries(folder)


def finish_update(folder: Path) -> None:
    """Move the new entries of a folder to their places if a kill has interrupted `atomic_update` while it did so.

    Every reader of such a folder calls it first. Nothing happens while another process is at it, nor in a folder that
    cannot be written.
    """
    if (folder / _COMPLETE).is_dir():
        with suppress(OSError), try_lock(folder / _UPDATE_LOCK) as is_mine:
            if is_mine:
                _move_entries(folder)


def _move_entries(folder: Path) -> None:
    """Move what `atomic_update` has completed to its place; also in part, if a kill interrupted that."""
    complete = folder / _COMPLETE
    if (complete / _PLAN).exists():  # it is deleted with the folder, after all else was moved
        plan = json.loads((complete / _PLAN).read_text(encoding="utf-8"))
        for name in plan["first"]:
            if name not in plan["entries"] or (complete / name).exists():  # else it is the new one
                remove(folder / name)
        for name in plan["entries"]:
            if (complete / name).exists():
                if (folder / name).is_dir():
                    remove(folder / name)
                os.replace(complete / name, folder / name)
        flush(folder)
    remove(complete)


@contextmanager
def _temporary_folder(folder: Path) -> Iterator[Path]:
    remove(folder)  # left by a run that was killed
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        with suppress(OSError):
            remove(folder)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """Delete a folder so that a kill leaves it in full, or under its temporary name."""
    remove(temporary_path(folder))
    os.replace(folder, temporary_path(folder))
    remove(temporary_path(folder))


def flush(path: Path) -> None:
    """Make sure that a file, or the entries of a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_all(folder: Path) -> None:
    for each in (*folder.rglob("*"), folder):
        flush(each)


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's bytes, in hexadecimal."""
    with file_errors(path, "cannot be read"), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
