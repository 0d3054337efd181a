"""A page in the browser that maps scenes with trained models.

    hf-seg demo --model runs/ensemble org/name
    hf-seg demo --model runs/ensemble --sample scenes/port.tif --max_megapixels 100

It prints its address and runs until Ctrl-C. Users choose one of the models; the folder of a model is never shown or
served. Their files are kept apart and deleted when they close the page, and all files at the end.
"""

import argparse
import importlib.util
import logging
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any

from hf_seg.demo.settings import DemoSettings
from hf_seg.errors import UserError, one_line_errors
from hf_seg.settings import Parser, filled

LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, DemoSettings]:
    """Read the command line.

    Raises:
        UserError: an unknown flag, a missing or wrong value, or any model for everybody.
    """
    parser = Parser(prog="hf-seg demo", description=__doc__)
    parser.add_argument("--model", nargs="+", required=True, help="models to choose from: folders or Hub ids")
    parser.add_argument("--sample", nargs="+", default=[], help="GeoTIFFs to try; default: one synthetic scene")
    parser.add_settings(DemoSettings)
    args = parser.parse_args(argv)
    settings = filled(DemoSettings, args)
    if settings.any_model and settings.host not in LOCAL_HOSTS:
        raise UserError(
            f"--any_model on --host {settings.host} would let others open folders of this computer; leave one of them "
            "out, and list the models with --model"
        )
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the page needs Gradio: pip install 'hf_seg[space]'")
    return args, settings


def run(argv: Sequence[str] | None = None) -> None:
    """Serve the page until the process is told to end.

    Raises:
        UserError: see `parse` and `hf_seg.demo.serve.serving`.
    """
    args, settings = parse(argv)

    from hf_seg.demo.serve import serving  # slow to import

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in ("httpx", "pyogrio"):
        logging.getLogger(name).setLevel(logging.WARNING)
    stopped = threading.Event()

    def stop(*_: Any) -> None:
        stopped.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    with serving(args.model, settings, samples=args.sample) as server:
        print(f"open {server.url} in a browser; Ctrl-C ends it", flush=True)
        stopped.wait()
    print("ended; all files of the page are deleted", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; a mistake is one line on stderr and exit code 2."""
    with one_line_errors():
        run(argv)


if __name__ == "__main__":
    main()
