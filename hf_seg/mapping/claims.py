"""Scenes shared by workers that know nothing of each other but the folder of the maps.

A worker holds the lock `.map.tif.lock` beside the map while it works on a scene (`hf_seg.locks`). The lock ends with
its worker, however that one ends, and another worker resumes the scene from its finished bands.
"""

import contextlib
import errno
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from hf_seg.errors import DISK_HINT, UserError, file_errors
from hf_seg.files import remove
from hf_seg.locks import try_lock

logger = logging.getLogger(__name__)

FINISHED = "finished"
POLL_SECONDS = 2.0  # between two looks at scenes that other workers map

Pair = tuple[str, Path]  # a scene and its map


@contextlib.contextmanager
def claim(destination: Path) -> Iterator[bool]:
    """Claim a map for the block; yields False if another worker has it.

    Raises:
        UserError: the folder cannot be written.
    """
    path = destination.with_name(f".{destination.name}.lock")
    with contextlib.ExitStack() as stack:
        with file_errors(destination, "cannot be written", DISK_HINT):
            if destination.parent.exists() and not destination.parent.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            is_mine = stack.enter_context(try_lock(path))
        yield is_mine


def share_scenes(
    pairs: Sequence[Pair], map_one: Callable[[str, Path], bool], *, replaced: Mapping[Path, int | None]
) -> int:
    """Map each scene that no other worker has mapped meanwhile, and wait for those that others are mapping.

    Args:
        pairs: what is missing, in any order.
        map_one: maps a scene; False if that failed, after saying why.
        replaced: when the maps to be replaced were last changed (`last_change`); a map that is not among them is done
            once it exists.

    Returns:
        How many failed here.
    """
    pending, failed, told = list(pairs), 0, False
    while pending:
        busy: list[Pair] = []
        for source, destination in pending:
            with claim(destination) as is_mine:
                if last_change(destination) != replaced.get(destination):
                    continue  # another worker has finished it
                if not is_mine:
                    busy.append((source, destination))
                elif not map_one(source, destination):
                    failed += 1
        if busy and len(busy) == len(pending):
            if not told:
                logger.info("%d scenes are being mapped by other workers; waiting for them", len(busy))
            told = True
            time.sleep(POLL_SECONDS)
        pending = busy
    return failed


def clear_finished(destination: Path, bands: Path) -> None:
    """Delete lock and bands of a finished map, whose worker was killed before it could.

    Args:
        bands: the folder of its finished bands; it contains `FINISHED` if all are in the map.
    """
    lock = destination.with_name(f".{destination.name}.lock")
    if destination.exists() and (lock.exists() or (bands / FINISHED).exists()):
        with contextlib.suppress(UserError), claim(destination) as is_mine:
            if is_mine and (bands / FINISHED).exists():
                remove(bands)


def require_claim(is_mine: bool, destination: Path) -> None:
    """Raise `UserError` if another process has claimed a map that this one cannot leave to it."""
    if not is_mine:
        raise UserError(f"{destination} is being made by another process; wait for it, or name another file")


def last_change(path: Path) -> int | None:
    """Return when a file was last changed, None if there is none."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None
