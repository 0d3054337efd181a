"""A user's mistake is one line on stderr, never a traceback."""

import os
import reprlib
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

_SECONDS_TO_END = 3.0  # a launcher looks every 0.1 s whether a process has failed
_SHOWN = 200  # characters of a value in a message


class UserError(ValueError):
    """A mistake that the user can fix; the message names the value or file, and how to fix it."""


class DatasetError(UserError):
    """Data on disk that cannot be used; the message says which file, why, and how to fix it."""


class FileError(UserError):
    """A file or folder of the user's that cannot be read or written; the message names it and the reason."""


class _Short(reprlib.Repr):
    """Values in few words, also those that are lists of lists of lists by YAML's aliases."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, _SHOWN, _SHOWN

    def repr_int(self, x: int, level: int) -> str:
        try:
            return super().repr_int(x, level)
        except ValueError:  # Python writes at most 4300 digits
            return f"a number of {x.bit_length()} bits"


def shown(value: object) -> str:
    """Return a value of a user's file or command line for a message: its `repr`, cut off where it is long."""
    text = _Short().repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def print_error(error: object) -> None:
    """Print what is wrong as one line on stderr; a file's name may have line breaks."""
    print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr, flush=True)


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

    So does what the operating system refuses about a file, e.g. since its name is too long.

    Of several processes the first reports what all have found, or wait for: when it ends, their launcher ends the
    others, which therefore do not report at once.
    """
    try:
        yield
    except Exception as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(_SECONDS_TO_END)
        if isinstance(error, OSError) and error.filename is not None:
            print_error(f"{os.fsdecode(error.filename)}: {error.strerror}")
        elif isinstance(error, UserError):
            print_error(error)
        else:
            raise
        raise SystemExit(2) from None
