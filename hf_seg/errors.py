"""A user's mistake is one line on stderr, never a traceback; so is a full disk, a broken one, or too little memory."""

import errno
import os
import reprlib
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

DISK_HINT = "free disk space or choose another place"

_SECONDS_TO_END = 3.0  # a launcher looks every 0.1 s whether a process has failed
_DISK_CODES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE)
_TORCH_WRITER = ("PytorchStreamWriter failed", "unexpected pos")  # torch.save does not say why it cannot write
# in messages of torch, CUDA, oneDNN, GDAL, OpenCV, C++, the dynamic linker, Python's threads, a loader's worker
_OUT_OF_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "Out of memory",
    "ALLOC_FAILED",
    "could not create a primitive",
    "failed to map segment",
    "Insufficient memory",
    "bad_alloc",
    "bad allocation",
    os.strerror(errno.ENOMEM),
    "can't start new thread",
    "out of shared memory",
    "is killed by signal: Killed",
)
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
    """Print what is wrong as one line on stderr, which no progress bar writes over; file names may have line breaks."""
    line = f"error: {' '.join(str(error).splitlines())}"
    tqdm = sys.modules.get("tqdm")
    if tqdm is None:
        print(line, file=sys.stderr)
    else:
        tqdm.tqdm.write(line, file=sys.stderr)
    sys.stderr.flush()


@contextmanager
def file_errors(path: object, action: str, hint: str = "") -> Iterator[None]:
    """Turn what the operating system refused into a `FileError` that names the file.

    Args:
        path: file or folder, as the user knows it.
        action: what failed, e.g. "cannot be read".
        hint: how to fix it.
    """
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error) or (reason := system_reason(error)) is None:
            raise
        raise FileError(f"{path} {action} ({reason}){hint and f'; {hint}'}") from error


def system_reason(error: Exception) -> str | None:
    """Return why the operating system refused to read or write; None for an error of another kind."""
    if isinstance(error, OSError):
        return error.strerror or " ".join(str(error).split()) or type(error).__name__
    return _disk_reason(error)


def _disk_reason(error: Exception) -> str | None:
    """Return what is wrong with the disk; None for another error.

    Libraries in C++ and Rust have exceptions of their own, with the reason in the message.
    """
    if isinstance(error, UserError):
        return None
    if getattr(error, "errno", None) in _DISK_CODES:
        return getattr(error, "strerror", None) or str(error)
    if any(phrase in str(error) for phrase in _TORCH_WRITER):
        return "not all of it could be written"
    return next((os.strerror(code) for code in _DISK_CODES if os.strerror(code) in str(error)), None)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether memory could not be had, of the host or of a GPU."""
    if isinstance(error, UserError):
        return False
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # that of torch
        return True
    return any(phrase in str(error) for phrase in _OUT_OF_MEMORY)


@contextmanager
def memory_errors(message: str) -> Iterator[None]:
    """Turn a failed allocation into a `UserError`, whose message says which setting to lower."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(message) from error


@contextmanager
def one_line_errors(memory_hint: str = "") -> Iterator[None]:
    """End the program with `error: ...` on stderr and exit code 2 on a `UserError`, a disk's error or lack of memory.

    So does what the operating system refuses about a file, e.g. since its name is too long.

    Of several processes the first reports what all have found, or wait for: when it ends, their launcher ends the
    others, which therefore do not report at once.

    Args:
        memory_hint: which settings of this program to lower where memory is short.
    """
    threading.excepthook = _hide_os_errors
    try:
        yield
    except Exception as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(_SECONDS_TO_END)
        message = _describe(error, memory_hint)
        if message is None:
            raise
        print_error(message)
        raise SystemExit(2) from None


def _describe(error: Exception, memory_hint: str) -> str | None:
    """Return the line that a user needs; None for a mistake of this program."""
    if isinstance(error, UserError):
        return str(error)
    if is_out_of_memory(error):
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        return f"out of memory ({reason}){memory_hint and f'; {memory_hint}'}"
    path = getattr(error, "filename", None)
    if problem := _disk_reason(error):
        return f"{path or 'a file'} cannot be read or written ({problem}); {DISK_HINT}"
    return None if path is None else f"{path} cannot be read or written ({system_reason(error)})"


def _hide_os_errors(found: threading.ExceptHookArgs) -> None:
    """Print what ended a thread, except an `OSError` of the tracker's: it hands that on to the main thread."""
    is_tracker = type(found.thread).__module__.startswith("tensorboard.")
    if not (is_tracker and isinstance(found.exc_value, OSError)):
        threading.__excepthook__(found)
