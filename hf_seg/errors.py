"""A user's mistake is one line on stderr, never a traceback."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

_SECONDS_TO_END = 3.0  # a launcher looks every 0.1 s whether a process has failed


class UserError(ValueError):
    """A mistake that the user can fix; the message names the value or file, and how to fix it."""


class DatasetError(UserError):
    """Data on disk that cannot be used; the message says which file, why, and how to fix it."""


class FileError(UserError):
    """A file or folder of the user's that cannot be read or written; the message names it and the reason."""


@contextmanager
def file_errors(path: object, action: str, hint: str = "") -> Iterator[None]:
    """Turn an `OSError` into a `FileError` that names the file.

    Args:
        path: file or folder, as the user knows it.
        action: what failed, e.g. "cannot be read".
        hint: how to fix it.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split()) or type(error).__name__
        raise FileError(f"{path} {action} ({reason}){hint and f'; {hint}'}") from error


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the program with `error: ...` on stderr and exit code 2 on a `UserError`.

    Of several processes the first reports what all have found, or wait for: when it ends, their launcher ends the
    others, which therefore do not report at once.
    """
    try:
        yield
    except Exception as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(_SECONDS_TO_END)
        if not isinstance(error, UserError):
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
