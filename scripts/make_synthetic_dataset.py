"""Make a world: optical tiles, optical/SAR pairs and labels, in the layout of OpenEarthMap and OpenEarthMap-SAR.

    python scripts/make_synthetic_dataset.py --output data/synthetic --train 48 --val 12 --test 4

writes data/toy/OpenEarthMap_wo_xBD and data/toy/dfc25_track1, ready for every recipe, and data/toy/dfc25_track1_extra,
which no recipe reads: the clean labels of train. With `--scene PX` also data/toy/scene.tif, one large SAR scene to map.
What the world is like, and how hard: the docstring of hf_seg/synthetic.
"""

import argparse
import os
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Make the world and return the exit status; a user's mistake is one line on stderr."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help="folder to create")
    parser.add_argument("--seed", metavar="S", type=int, default=0, help="same seed, same bytes (%(default)s)")
    parser.add_argument("--source", metavar="N", type=int, default=24, help="labelled optical tiles (%(default)s)")
    parser.add_argument("--train", metavar="N", type=int, default=48, help="pairs with noisy labels (%(default)s)")
    parser.add_argument("--val", metavar="N", type=int, default=12, help="SAR scenes, clean labels (%(default)s)")
    parser.add_argument("--test", metavar="N", type=int, default=0, help="the same, for the end (%(default)s)")
    parser.add_argument("--size", metavar="PX", type=int, default=256, help="side of a tile (%(default)s)")
    parser.add_argument("--scene", metavar="PX", type=int, default=0, help="side of one large SAR scene (%(default)s)")
    parser.add_argument("--num_workers", metavar="W", type=int, default=os.cpu_count() or 1, help="processes")
    options = parser.parse_args(arguments)

    from hf_seg.synthetic import SyntheticDatasetError, make_synthetic_dataset  # here, so that --help is quick

    try:
        output = make_synthetic_dataset(**vars(options))
    except (SyntheticDatasetError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    print(f"OpenEarthMap: {output / 'OpenEarthMap_wo_xBD'}\nOpenEarthMap-SAR: {output / 'dfc25_track1'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
