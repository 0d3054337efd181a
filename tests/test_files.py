"""Files and folders that are replaced: what a reader finds after a crash at any call of the system."""

import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from hf_seg import files
from hf_seg.errors import UserError
from hf_seg.files import atomic_folder, atomic_update, finish_update, restore

CALLS = [(os, name) for name in ("replace", "fsync", "mkdir", "unlink", "rmdir")] + [(files, "_exchange")]
OLD = {"config.json": "old", "member_0/weights": "old", "member_1/weights": "old", "scores.json": "old"}
NEW = {"config.json": "new", "member_0/weights": "new"}
OTHER = {"metrics.jsonl": "stays"}


def write(folder: Path, content: dict[str, str]) -> None:
    for name, text in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def read(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def seen(folder: Path) -> dict[str, str]:
    """Return what is not hidden."""
    return {name: text for name, text in read(folder).items() if not name.startswith(".")}


def replace(folder: Path) -> None:
    with atomic_folder(folder) as temporary:
        write(temporary, NEW)


def update(folder: Path) -> None:
    with atomic_update(folder, first=["config.json", "member_0", "member_1", "scores.json"], last="config.json") as new:
        write(new, NEW)


def every_crash(folder: Path, before: dict[str, str], action: Callable[[Path], object]) -> Iterator[Path]:
    """Yield a folder as a kill leaves it before and after each call of the system that an action on it makes.

    From that call on all calls fail, so that nothing cleans up; locks end with their holder.
    """
    number, is_complete = 0, False
    while not is_complete:
        number += 1
        place = folder / str(number) / "folder"
        write(place, before)
        with pytest.MonkeyPatch.context() as patch:
            calls = itertools.count(1)
            for owner, name in CALLS:
                patch.setattr(owner, name, partial(count_call, getattr(owner, name), calls, number))
            try:
                action(place)
                is_complete = True
            except Killed:
                pass
        yield place
    assert number > 10


class Killed(BaseException):
    """Nothing is done any more."""


def count_call(
    function: Callable[..., object], calls: Iterator[int], last: int, *args: object, **kwargs: object
) -> object:
    if next(calls) >= last:
        raise Killed
    result = function(*args, **kwargs)
    if next(calls) >= last:
        raise Killed
    return result


def test_a_folder_is_the_old_or_the_new_one_at_every_instant(tmp_path: Path) -> None:
    for folder in every_crash(tmp_path, OLD, replace):
        assert read(folder) in (OLD, NEW)
        replace(folder)
        assert read(folder) == NEW and [*folder.parent.iterdir()] == [folder]


def test_without_an_exchange_of_folders_the_old_one_is_restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    restored = 0
    for folder in every_crash(tmp_path, OLD, replace):
        restored += not folder.exists()
        restore(folder)
        assert read(folder) in (OLD, NEW)
        replace(folder)
        assert read(folder) == NEW and [*folder.parent.iterdir()] == [folder]
    assert restored == 2  # after the first of two renames, and before the second


def test_an_update_is_never_taken_for_complete_before_it_is_and_can_be_finished(tmp_path: Path) -> None:
    interrupted = 0
    for folder in every_crash(tmp_path, OLD | OTHER, update):
        before = seen(folder)
        assert "config.json" not in before or before in (OLD | OTHER, NEW | OTHER)
        interrupted += "config.json" not in before
        finish_update(folder)
        assert seen(folder) in (OLD | OTHER, NEW | OTHER)
        if "config.json" not in before:
            assert read(folder) == NEW | OTHER
        update(folder)
        assert read(folder) == NEW | OTHER and {path.name for path in folder.iterdir()} == {
            "config.json",
            "member_0",
            "metrics.jsonl",
        }
    assert interrupted > 5


def test_finishing_an_update_can_be_interrupted_too(tmp_path: Path) -> None:
    pending = next(folder for folder in every_crash(tmp_path / "a", OLD, update) if (folder / ".complete").is_dir())
    state = read(pending)
    for folder in every_crash(tmp_path / "b", state, finish_update):
        assert "config.json" not in seen(folder) or seen(folder) in (OLD, NEW)
        finish_update(folder)
        assert seen(folder) == NEW
        assert {path.name for path in folder.iterdir()} <= {"config.json", "member_0", ".update.lock"}


def test_a_second_writer_is_refused_and_a_reader_leaves_the_first_alone(tmp_path: Path) -> None:
    for write_twice in (atomic_folder, atomic_update):
        folder = tmp_path / write_twice.__name__
        write(folder, OLD)
        with write_twice(folder):
            finish_update(folder)
            with (
                pytest.raises(UserError, match=rf"{folder} is in use by another process \(pid {os.getpid()}\)"),
                write_twice(folder),
            ):
                pass
        shutil.rmtree(folder)
    assert [*tmp_path.iterdir()] == []


def test_a_block_that_fails_leaves_the_old_content_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "old", OLD)
    for write_once in (atomic_folder, atomic_update):
        for name in ("old", "missing"):
            with pytest.raises(ZeroDivisionError), write_once(tmp_path / name) as temporary:
                write(temporary, {**NEW, "half": str(1 / 0)})
    assert read(tmp_path) == {f"old/{name}": text for name, text in OLD.items()}
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
