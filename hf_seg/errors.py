"""A user's mistake is one line on stderr, never a traceback."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """A mistake of the user: recipes and scripts show it as one line, without a traceback."""


@contextmanager
def one_line_errors(*also: type[Exception]) -> Iterator[None]:
    """End the program with `error: ...` on stderr and exit code 2 where the user made a mistake.

    Args:
        also: exception types that are the user's, beside `UserError`.
    """
    users: tuple[type[Exception], ...] = (UserError, *also)
    try:
        yield
    except users as error:
        message = str(error)
        if "Original Traceback" in message:  # of a loader's worker: the last line is the error itself
            message = message.strip().splitlines()[-1].partition(": ")[2]
        print(f"error: {message}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
