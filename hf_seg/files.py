"""Files and folders that appear atomically, and their checksums.

A file is written under a temporary name beside its place, flushed to the disk and renamed, so that neither a kill nor a
power cut nor a full disk leaves half of it under its name. What cannot be written or read is a `FileError`.
"""

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hf_seg.errors import DISK_HINT, file_errors


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
    """Yield an empty temporary folder that replaces `folder` if the block ends without an error."""
    replaced = folder.with_name(f".replaced.{folder.name}")
    with file_errors(folder, "cannot be written", DISK_HINT), _temporary_folder(temporary_path(folder)) as temporary:
        yield temporary
        _flush_all(temporary)
        remove(replaced)  # left by a run that was killed
        if folder.exists():
            os.replace(folder, replaced)
        try:
            os.replace(temporary, folder)
            flush(folder.parent)
        except OSError:
            remove(folder)
            if replaced.exists():
                os.replace(replaced, folder)
            raise
        remove(replaced)


@contextmanager
def atomic_update(folder: Path, *, first: Iterable[str] = (), last: str = "") -> Iterator[Path]:
    """Yield an empty temporary folder whose entries replace those of the same name in `folder`; other entries stay.

    Each entry is replaced atomically, but not all at once. So that no mixture of old and new entries is taken for
    complete, the entries `first` are deleted before the others are replaced, and `last` is written at the end.
    """
    with file_errors(folder, "cannot be written", DISK_HINT), _temporary_folder(folder / ".partial") as temporary:
        yield temporary
        _flush_all(temporary)
        for name in first:
            remove(folder / name)
        for entry in sorted(temporary.iterdir(), key=lambda entry: (entry.name == last, entry.name)):
            if (folder / entry.name).is_dir():
                shutil.rmtree(folder / entry.name)
            os.replace(entry, folder / entry.name)


@contextmanager
def _temporary_folder(folder: Path) -> Iterator[Path]:
    remove(folder)  # left by a run that was killed
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Make sure that a file, or the entries of a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_all(folder: Path) -> None:
    for file in folder.rglob("*"):
        flush(file)


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's bytes, in hexadecimal."""
    with file_errors(path, "cannot be read"), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
