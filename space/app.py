"""The page as a Hugging Face Space, whose variables MODELS, SAMPLES and OPTIONS are described in README.md."""

import os
import shlex
import sys

from hf_seg.demo.cli import main

if not os.environ.get("MODELS", "").split():
    sys.exit("error: set the variable MODELS of this Space to the Hub ids of the models to offer, e.g. org/name")
samples = os.environ.get("SAMPLES", "").split()
main(
    ["--host", "0.0.0.0", "--model", *os.environ["MODELS"].split()]  # noqa: S104 (a Space is reached from outside)
    + (["--sample", *samples] if samples else [])
    + shlex.split(os.environ.get("OPTIONS", ""))
)
