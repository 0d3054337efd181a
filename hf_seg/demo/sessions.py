"""The files of the page's users: one private folder per session, deleted when the session ends or rests.

Gradio serves whatever lies below its temporary folder, `root` here, to whoever knows the path. So everything of a user
lies in a folder whose name cannot be guessed. Uploads come to `root/<salted hash of the content>/<name>`, where two
users with the same file share it; a session links it into its own folder, and an upload without links is deleted.
"""

import contextlib
import os
import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from hf_seg.errors import UserError
from hf_seg.files import remove

UNUSED_SECONDS = 120.0  # age at which an upload that no session has taken, or that has stalled, is deleted
SWEEP_SECONDS = 30.0


@dataclass(eq=False)
class Session:
    """One user's folder, scene and run.

    Args:
        folder: where all of its files lie.
        stop: set to stop the run; each run has one of its own.
        scene: the scene to map; None before there is one.
        used: when it was last used, in seconds of `time.monotonic`.
        runs: in progress, waiting ones included.
        is_closed: the user has left.
    """

    folder: Path
    stop: threading.Event = field(default_factory=threading.Event)
    scene: Path | None = None
    used: float = field(default_factory=time.monotonic)
    runs: int = 0
    is_closed: bool = False

    def new_folder(self) -> Path:
        """Create an empty folder in that of the session; each has another name, so no browser shows an old file."""
        folder = self.folder / secrets.token_hex(8)
        folder.mkdir(parents=True)
        return folder

    def keep_only(self, *folders: Path) -> None:
        """Delete what the session has but these folders."""
        for folder in self.folder.iterdir() if self.folder.exists() else ():
            if folder not in folders:
                remove(folder)


class Sessions:
    """All sessions of a server.

    Args:
        root: Gradio's temporary folder, of this server alone.
        keep_seconds: a session that is not used for this long is deleted.
    """

    def __init__(self, root: Path, *, keep_seconds: float) -> None:
        self.root, self.keep_seconds = root, keep_seconds
        self._sessions: dict[str, Session] = {}
        self._lock = threading.Lock()

    def get(self, key: str | None) -> Session:
        """Return the session of a key, which the browser makes up; a new one has an empty folder.

        Raises:
            UserError: no key.
        """
        if not key:
            raise UserError("this request belongs to no session; open the page in a browser")
        with self._lock:
            if key not in self._sessions:
                folder = self.root / secrets.token_hex(16)
                folder.mkdir(mode=0o700, parents=True)
                self._sessions[key] = Session(folder)
            session = self._sessions[key]
            session.used = time.monotonic()
            return session

    @contextlib.contextmanager
    def running(self, session: Session) -> Iterator[None]:
        """Keep the folder of a session while a run of it works there; of a closed one nothing is left at the end."""
        with self._lock:
            session.runs += 1
        try:
            yield
        finally:
            with self._lock:
                session.runs -= 1
                session.used = time.monotonic()
                if session.is_closed and not session.runs:
                    remove(session.folder)

    def close(self, key: str | None) -> None:
        """Stop the run of a session and delete its files."""
        with self._lock:
            session = self._sessions.pop(key or "", None)
            if session is not None:
                session.is_closed = True
                session.stop.set()
                if not session.runs:
                    remove(session.folder)

    def sweep(self, *, unused_seconds: float = UNUSED_SECONDS) -> None:
        """Delete resting sessions, and uploads that no session has taken or still has."""
        with self._lock:
            rests = time.monotonic() - self.keep_seconds
            resting = [key for key, session in self._sessions.items() if session.used < rests and not session.runs]
        for key in resting:
            self.close(key)
        entries = [*self.root.iterdir()]
        with self._lock:  # after the list of entries, so that no new folder is missing here
            folders = {session.folder for session in self._sessions.values()}
        for entry in entries:
            if entry not in folders:
                _delete_unused(entry, time.time() - unused_seconds)

    @contextlib.contextmanager
    def sweeping(self) -> Iterator[None]:
        """Sweep now and then while the block runs."""
        ended = threading.Event()

        def sweep() -> None:
            while not ended.wait(SWEEP_SECONDS):
                with contextlib.suppress(OSError):  # a file that another thread has just deleted
                    self.sweep()

        thread = threading.Thread(target=sweep, name="sweep", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def _delete_unused(entry: Path, before: float) -> None:
    """Delete an upload, or the folder of one, that nothing links to and that was last written before a time."""
    with contextlib.suppress(FileNotFoundError):
        for file in [*entry.iterdir()] if entry.is_dir() else [entry]:
            status = file.stat()
            if file.is_file() and status.st_nlink == 1 and status.st_mtime < before:
                file.unlink()
        if entry.is_dir() and not any(entry.iterdir()):
            entry.rmdir()


def take_upload(upload: Path, place: Path) -> None:
    """Link an upload to its place in a session's folder, which keeps it from being deleted.

    Raises:
        UserError: it is not there any more.
    """
    try:
        os.link(upload, place)
    except FileNotFoundError:
        raise UserError(f"{place.name} is no longer on the server; upload it again") from None
