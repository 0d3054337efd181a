"""Map a synthetic scene in a fresh process and measure peak memory, time, and the part of it outside the network.

    python scripts/benchmark_raster.py --width 20000 --height 20000 --model pointwise --window 512 --stride 1
    python scripts/benchmark_raster.py --width 20000 --height 20000 --model toy-segformer --window 512 --stride 1

Prints one JSON object. "pointwise" is a 1x1 convolution, which costs next to nothing, so it measures everything around
the network; the other models are presets of `hf_seg.models` with random weights. The scene is uint8 SAR-like speckle
with a slanted collar of zeros, in 512 x 512 tiles, deflate, EPSG:32654.
"""

import json
import multiprocessing
import resource
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hf_seg.errors import DISK_HINT, UserError, file_errors, one_line_errors
from hf_seg.labels import OPEN_EARTH_MAP
from hf_seg.settings import Parser, check_bounds, setting

if TYPE_CHECKING:
    import torch

STRIP = 500  # rows that are generated together; not a multiple of windows and tiles


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions:
    """Benchmark."""

    width: int = setting(5000, "width of the scene in pixels", low=1)
    height: int = setting(5000, "height of the scene in pixels", low=1)
    model: str = setting("pointwise", "pointwise, or a preset of hf_seg.models")
    window: int = setting(512, "side of the window in pixels", low=1)
    stride: float = setting(0.5, "step of the window as a fraction of it", above=0, high=1)
    output_dir: str | None = setting(None, "keeps the scene and the map; default: a temporary folder")

    def __post_init__(self) -> None:
        check_bounds(self)


def write_scene(path: Path, width: int, height: int) -> None:
    """Write fields of different brightness under speckle, and zeros left of a slanted line."""
    import rasterio
    from rasterio.transform import from_origin
    from rasterio.windows import Window

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


def build_network(name: str, window: int) -> "torch.nn.Module":
    """Build a network with random weights."""
    import torch

    from hf_seg.models import PRESETS, build_model

    torch.manual_seed(0)
    if name == "pointwise":
        return torch.nn.Conv2d(3, OPEN_EARTH_MAP.num_labels, 1).requires_grad_(False)
    if name not in PRESETS:
        raise UserError(f"unknown model {name!r}; choose one of pointwise, {', '.join(PRESETS)}")
    return build_model(name, crop_size=window, from_scratch=True)


def main() -> None:
    """Write the scene, map it and print what was measured."""
    parser = Parser(description=__doc__)
    parser.add_settings(BenchmarkOptions)
    options = BenchmarkOptions(**vars(parser.parse_args()))
    from hf_seg.mapping.raster import predict_raster  # slow to import

    network = build_network(options.model, options.window)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.output_dir or temporary)
        size = f"{options.width}x{options.height}"
        scene = folder / f"scene_{size}.tif"
        with file_errors(folder, "cannot be written", DISK_HINT):
            folder.mkdir(parents=True, exist_ok=True)
        # in a process of its own, whose memory is not counted
        writer = multiprocessing.Process(target=write_scene, args=(scene, options.width, options.height))
        writer.start()
        writer.join()
        if writer.exitcode:
            raise UserError(f"{scene} cannot be written; {DISK_HINT}")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        summary = predict_raster(
            network,
            scene,
            folder / f"map_{size}.tif",
            window=options.window,
            stride=options.stride,
            overwrite=True,
        )
        seconds = time.perf_counter() - start
    figures = {
        **{name: getattr(options, name) for name in ("width", "height", "model", "window", "stride")},
        "peak_rss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "rss_before_mib": round(before / 1024),
        "seconds": round(seconds, 1),
        "outside_network": round(1 - summary.network_seconds / seconds, 3),
        "seam_score": summary.seam_score,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    with one_line_errors():
        main()
