"""Make a synthetic dataset: optical tiles, optical/SAR pairs and labels, laid out as OpenEarthMap and OpenEarthMap-SAR.

    python scripts/make_synthetic_dataset.py --output data/synthetic --seed 7 --scene 2048

writes data/synthetic/OpenEarthMap_wo_xBD and data/synthetic/dfc25_track1, which every recipe reads, and
data/synthetic/dfc25_track1_extra, the exact labels of train, which none reads. With `--scene 2048` it also writes
scene.tif, a large SAR scene of many districts to map, and scene_label.tif, its exact labels.
"""

import os
import sys
from pathlib import Path

from hf_seg.errors import one_line_errors
from hf_seg.settings import Parser
from hf_seg.synthetic import SOURCE_FOLDER, TARGET_FOLDER, SyntheticSettings, make_synthetic_dataset
from hf_seg.terminal import print_summary


def main(arguments: list[str] | None = None) -> int:
    """Make the dataset and return the exit status; a user's mistake is one line on stderr."""
    parser = Parser(description=__doc__)
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help="folder to create")
    processes = os.cpu_count() or 1
    parser.add_argument("--num_workers", metavar="N", type=int, default=processes, help="processes (%(default)s)")
    parser.add_settings(SyntheticSettings)
    with one_line_errors():
        try:
            output = make_synthetic_dataset(**vars(parser.parse_args(arguments)))
        except KeyboardInterrupt:
            print("interrupted; nothing was written", file=sys.stderr)
            return 130
    folders = {"source_dir": output / SOURCE_FOLDER, "data_dir": output / TARGET_FOLDER}
    print_summary("OpenEarthMap: {source_dir}, OpenEarthMap-SAR: {data_dir}".format(**folders), folders)
    return 0


if __name__ == "__main__":
    sys.exit(main())
