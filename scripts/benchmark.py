"""Measure speed and memory against what a user would otherwise use, side by side in one run.

    make benchmark                                       # with the peers, in an environment of their own
    python scripts/benchmark.py [--repeats 5] [--json FILE] [metric] [lovasz] [loader] ...

Ours and each peer take turns. A row has the median and the range of both, and the ratio peer / ours: above 1 ours is
faster or smaller. Where values must agree, they are compared. A peer that is not installed has a blank cell.
Scenes of 5,000 pixels and more: `scripts/benchmark_raster.py`.
"""

import importlib.util
import json
from pathlib import Path

from hf_seg.errors import UserError, one_line_errors
from hf_seg.files import write_atomic
from hf_seg.settings import Parser, nearest

BENCHMARKS = {
    "metric": "arithmetic",
    "lovasz": "arithmetic",
    "losses": "arithmetic",
    "stage2": "training",
    "stage1": "training",
    "ema": "arithmetic",
    "loader": "loading",
    "startup": "startup",
    "scene": "prediction",
    "members": "prediction",
}
PEERS = ("torchmetrics", "segmentation_models_pytorch", "torchgeo")


def main(argv: list[str] | None = None) -> None:
    """Run the named benchmarks, or all."""
    parser = Parser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--size", type=int, default=1024, help="side of the large image in pixels (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed repeats (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (%(default)s)")
    parser.add_argument("--json", metavar="FILE", help="also write the figures here")
    args = parser.parse_args(argv)
    for name in args.names:
        if name not in BENCHMARKS:
            raise UserError(f"unknown benchmark {name!r}{nearest(name, BENCHMARKS)}")
    for name, low in (("size", 128), ("repeats", 1), ("threads", 1)):
        if getattr(args, name) < low:
            raise UserError(f"--{name} must be at least {low}; it is {getattr(args, name)}")
    import torch

    torch.set_num_threads(args.threads)
    missing = [name for name in PEERS if importlib.util.find_spec(name) is None]
    if missing:
        print(f"not installed, their cells are blank: {', '.join(missing)}; pip install 'hf_seg[benchmark]'")
    rows = []
    for name in args.names or BENCHMARKS:
        function = getattr(importlib.import_module(f"benchmarks.{BENCHMARKS[name]}"), name)
        for result in function(args.size, args.repeats):
            ratios = result.ratios()
            print(f"{result.name:60s} {result.ours!s:>28s} {result.unit:3s} goal: {result.goal or '-'}")
            for peer, figure in result.peers.items():
                ratio = f"x {ratios[peer]:.3g}" if ratios[peer] is not None else ""
                print(f"    {peer:56s} {figure or ''!s:>28s} {result.unit:3s} {ratio}", flush=True)
            rows.append(result.as_dict())
    if args.json:
        how = {"size": args.size, "repeats": args.repeats, "threads": args.threads, "missing": missing}
        write_atomic(Path(args.json), json.dumps({**how, "results": rows}, indent=1))


if __name__ == "__main__":
    with one_line_errors():
        main()
