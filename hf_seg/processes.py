"""Processes that end with the one that started them, however that one ends."""

import os
import signal
import threading
import time

POLL_SECONDS = 0.5
GRACE_SECONDS = 30.0  # for an orderly stop, e.g. to write a checkpoint
LAUNCHER = "HF_SEG_LAUNCHER"  # id of the process that has launched several


def end_with_launcher() -> None:
    """Call `end_with_parent` in each of several processes; before they meet, since they would wait without end."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        end_with_parent(int(os.environ.get(LAUNCHER, os.getppid())))


def end_with_parent(parent: int | None = None) -> None:
    """Send this process SIGTERM when its parent is gone, and SIGKILL if it then does not end in time.

    A launcher that is killed cannot end its processes, and a pool of workers waits for work for ever.

    Args:
        parent: its id, if it may be gone already.
    """
    parent = os.getppid() if parent is None else parent

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="end_with_parent", daemon=True).start()
