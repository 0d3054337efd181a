"""What a forked command does before it starts: its user agrees to everything."""

import io
import sys


def answer_yes() -> None:
    """Answer each question with yes."""
    sys.stdin = io.StringIO("y\n" * 100)
