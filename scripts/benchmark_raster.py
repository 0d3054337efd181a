"""Map a generated scene and measure it: peak memory of a fresh process, time, and how much of it the network takes.

    python scripts/benchmark_raster.py --width 20000 --height 20000 --network pointwise --window 512 --stride 1
    python scripts/benchmark_raster.py --width 20000 --height 20000 --network toy-segformer --window 512 --stride 1

Prints one JSON object. "pointwise" is a 1x1 convolution, which costs next to nothing, so what is measured is everything
around the network; the other networks are presets of `hf_seg.models` with random weights. The scene is uint8 SAR-like
speckle with a slanted collar of zeros, 512 x 512 tiles, deflate, EPSG:32654.
"""

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import rasterio
import torch
from rasterio.transform import from_origin
from rasterio.windows import Window

from hf_seg.labels import NUM_LABELS
from hf_seg.mapping.raster import predict_raster
from hf_seg.models import PRESETS, build_model

STRIP = 500  # rows that are generated together; like the fields, out of step with windows and tiles


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=5000, help="of the scene in pixels (5000)")
    parser.add_argument("--height", type=int, default=5000, help="of the scene in pixels (5000)")
    parser.add_argument("--network", default="pointwise", choices=("pointwise", *PRESETS), help="pointwise")
    parser.add_argument("--window", type=int, default=512, help="in pixels (512)")
    parser.add_argument("--stride", type=float, default=0.5, help="as a share of the window (0.5)")
    parser.add_argument("--folder", type=Path, help="where scene and map go, and stay; default: a temporary one")
    return parser.parse_args()


def write_scene(path: Path, width: int, height: int) -> None:
    """Write fields of different brightness under speckle, and zeros left of a slanted line."""
    rng = np.random.default_rng(0)
    fields = np.kron(rng.integers(20, 80, (STRIP // 100, width // 100 + 1)), np.ones((100, 100)))[:, :width]
    strip = np.clip(fields * np.sqrt(rng.gamma(4, 1 / 4, fields.shape)), 1, 255).astype(np.uint8)
    profile = {"dtype": "uint8", "tiled": True, "blockxsize": 512, "blockysize": 512, "compress": "deflate"}
    georeference = {"crs": "EPSG:32654", "transform": from_origin(400_000, 4_000_000, 0.5, 0.5)}
    with rasterio.open(path, "w", "GTiff", width, height, 1, **georeference, **profile) as file:
        for top in range(0, height, STRIP):
            rows = np.roll(strip, int(rng.integers(width)), axis=1)[: height - top]
            edge = (np.arange(top, top + len(rows)) * width) // (10 * height)
            file.write(
                np.where(np.arange(width) < edge[:, None], 0, rows).astype(np.uint8)[None],
                window=Window(0, top, width, len(rows)),
            )


def make_network(name: str, window: int) -> torch.nn.Module:
    """Build a network with random weights."""
    torch.manual_seed(0)
    if name == "pointwise":
        return torch.nn.Conv2d(3, NUM_LABELS, 1).requires_grad_(False)
    return build_model(name, crop_size=window, from_scratch=True)


def main() -> None:
    """Generate, map, measure."""
    args = parse()
    with tempfile.TemporaryDirectory(dir=args.folder.parent if args.folder else None) as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        scene = folder / f"scene_{args.width}x{args.height}.tif"
        writer = multiprocessing.Process(target=write_scene, args=(scene, args.width, args.height))
        writer.start()  # its memory is not this process's
        writer.join()
        network = make_network(args.network, args.window)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        summary = predict_raster(
            network,
            scene,
            folder / f"map_{args.width}x{args.height}.tif",
            window=args.window,
            stride=args.stride,
            overwrite=True,
        )
        seconds = time.perf_counter() - start
    figures = {
        **{name: getattr(args, name) for name in ("width", "height", "network", "window", "stride")},
        "peak_rss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "rss_before_mib": round(before / 1024),
        "seconds": round(seconds, 1),
        "outside_network": round(1 - summary.network_seconds / seconds, 3),
        "seam_score": summary.seam_score,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
