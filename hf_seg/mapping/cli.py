"""Map scenes of any size: GeoTIFF in, GeoTIFF out.

    hf-seg-predict scene.tif map.tif --model org/name-or-folder
    hf-seg-predict 'scenes/*.tif' more_scenes/ maps/ --model runs/ensemble --tta flips --confidence --preview
    torchrun --nproc_per_node 4 -m hf_seg.mapping.cli scenes/ maps/ --model runs/ensemble

The last argument is the map, or the folder of the maps if there are several scenes. Several processes share the scenes,
or the bands of each scene if there are fewer scenes than processes. A killed run resumes with the same command; scenes
that already have a map are skipped.
"""

import argparse
import dataclasses
import glob
import logging
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import numpy as np

from hf_seg.arguments import Tta
from hf_seg.errors import UserError, file_errors, one_line_errors
from hf_seg.mapping.options import RasterOptions
from hf_seg.settings import Parser

if TYPE_CHECKING:  # torch, accelerate and transformers are slow to import: after the command line is parsed
    from accelerate import PartialState

    from hf_seg.inference.predict import Predictor

logger = logging.getLogger(__name__)


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, RasterOptions]:
    """Read the command line.

    Raises:
        UserError: an unknown flag (with the nearest known one), or a missing or wrong value.
    """
    parser = Parser(prog="hf-seg-predict", description=__doc__)
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="scenes: files, folders, or patterns in quotes")
    parser.add_argument("destination", metavar="DESTINATION", help="the map, or the folder of the maps")
    model = parser.add_argument_group("Model")
    model.add_argument("--model", required=True, help="folder or Hub id of a trained network or an ensemble")
    model.add_argument(
        "--window", type=int, help="side of the window in pixels; default: the crop size of the training"
    )
    model.add_argument("--tta", default="none", choices=get_args(Tta), help="test-time augmentation (none)")
    model.add_argument(
        "--mixed_precision", default="no", choices=("no", "bf16", "fp16"), help="arithmetic of the networks (no)"
    )
    parser.add_settings(RasterOptions)
    actions = {action.dest: action for action in parser._actions}
    # these end with their last number, so that scenes may follow
    actions["bands"].nargs, actions["bands"].type, actions["bands"].metavar = None, _band_numbers, "N [N N]"
    actions["stretch"].nargs, actions["stretch"].metavar = 2, ("LOW", "HIGH")
    args = parser.parse_args(_join_bands(sys.argv[1:] if argv is None else argv))
    names = {field.name for field in dataclasses.fields(RasterOptions)}
    return args, RasterOptions(**{name: value for name, value in vars(args).items() if name in names})


def _join_bands(words: Sequence[str]) -> list[str]:
    """Turn `--bands 4 3 2` into `--bands 4,3,2`."""
    joined: list[str] = []
    for word in words:
        if word.isdigit() and len(joined) > 1 and joined[-2] == "--bands":
            joined[-1] += f",{word}"
        else:
            joined.append(word)
    return joined


def _band_numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected band numbers, e.g. 4 3 2 or 4,3,2; got {text!r}") from None


def find_scenes(sources: Sequence[str]) -> list[str]:
    """Return the scenes that files, folders (their .tif and .tiff) and patterns name, each once, in order.

    Raises:
        UserError: a folder without GeoTIFFs, or a pattern that matches nothing.
    """
    scenes: list[str] = []
    for source in sources:
        with file_errors(source, "cannot be read"):
            if Path(source).is_dir():
                files = sorted(Path(source).iterdir())
                found = [str(path) for path in files if path.suffix.lower() in (".tif", ".tiff")]
                problem = f"{source} is a folder without .tif or .tiff files"
            elif glob.has_magic(source) and not Path(source).exists():
                found, problem = sorted(glob.glob(source, recursive=True)), f"nothing matches {source}"
            else:
                found, problem = [source], ""
        if not found:
            raise UserError(problem)
        scenes += found
    return list(dict.fromkeys(scenes))


def pair_targets(scenes: Sequence[str], destination: str, *, overwrite: bool) -> list[tuple[str, Path]]:
    """Pair each scene with its map; of several scenes, those that already have a map are left out.

    Raises:
        UserError: several scenes and one file, or two scenes whose maps would have the same name.
    """
    target = Path(destination)
    with file_errors(destination, "cannot be written"):
        is_folder = target.is_dir() or destination.endswith("/")
        if len(scenes) == 1 and not is_folder:
            return [(scenes[0], target)]
        if target.suffix.lower() in (".tif", ".tiff") or target.is_file():
            raise UserError(f"{len(scenes)} scenes cannot be mapped to one file, {destination}; name a folder")
        pairs: dict[Path, str] = {}
        for scene in scenes:
            path = target / f"{Path(scene).stem}.tif"
            if path in pairs:
                raise UserError(f"{pairs[path]} and {scene} would both be mapped to {path}; map them in two runs")
            pairs[path] = scene
        done = {path for path in pairs if len(scenes) > 1 and path.exists() and not overwrite}
    if done:
        logger.info("%d of %d scenes are skipped, their maps exist: %s ...", len(done), len(pairs), min(done))
    return [(scene, path) for path, scene in pairs.items() if path not in done]


def map_scene(
    predictor: "Predictor",
    source: str,
    destination: Path,
    options: RasterOptions,
    state: "PartialState",
    *,
    is_shared: bool,
) -> None:
    """Map one scene and print its summary; a shared scene is mapped by all processes, each a part of its bands."""
    from hf_seg.mapping.gdal import gdal_session
    from hf_seg.mapping.job import MapJob

    is_main = state.is_main_process or not is_shared
    wait = state.wait_for_everyone if is_shared else lambda: None
    with gdal_session(), closing(MapJob(predictor, source, destination, options)) as job:
        if is_main:
            job.prepare()
        wait()
        bands = job.missing()
        wait()  # no process saves a band before all have listed the missing ones
        if is_shared:
            bands = np.array_split(np.array(bands, dtype=int), state.num_processes)[state.process_index].tolist()
        job.compute(bands, show_progress=state.is_main_process)
        wait()
        if is_main:
            print(job.finish(), flush=True)
        wait()


def run(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, load the networks and map the scenes.

    Raises:
        UserError: see `parse`, `find_scenes`, `pair_targets`, `hf_seg.predict_raster`.
    """
    args, options = parse(argv)
    scenes = find_scenes(args.sources)
    if len(scenes) > 1 and options.polygons is not None and Path(options.polygons).suffix:
        raise UserError(
            f"--polygons {options.polygons} is one file for {len(scenes)} scenes; name a suffix only: .gpkg"
        )

    import torch
    from accelerate import PartialState
    from transformers.utils.logging import disable_progress_bar

    from hf_seg.inference.predict import Predictor
    from hf_seg.mapping.raster import find_networks

    state = PartialState(cpu=not torch.accelerator.is_available())
    logging.basicConfig(level=logging.INFO if state.is_main_process else logging.ERROR, format="%(message)s")
    logging.getLogger("rasterio").setLevel(logging.ERROR)  # its errors are raised as exceptions too
    disable_progress_bar()
    pairs = pair_targets(scenes, args.destination, overwrite=options.overwrite)
    state.wait_for_everyone()  # no process writes a map before all have listed the missing ones
    if not pairs:
        return
    predictor = Predictor(
        find_networks(args.model, window=args.window),
        device=state.device,
        tta=args.tta,
        mixed_precision=args.mixed_precision,
    )
    is_shared = len(pairs) < state.num_processes
    mine = pairs if is_shared else pairs[state.process_index :: state.num_processes]
    failed = 0
    for source, destination in mine:
        try:
            map_scene(predictor, source, destination, options, state, is_shared=is_shared)
        except UserError as error:
            if is_shared or len(scenes) == 1:
                raise
            print(f"error: {error}", file=sys.stderr, flush=True)  # the other scenes are still mapped
            failed += 1
    state.wait_for_everyone()
    if failed:
        raise UserError(f"{failed} of {len(mine)} scenes have no map, see above")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; a mistake is one line on stderr and exit code 2."""
    with one_line_errors():
        try:
            run(argv)
        except KeyboardInterrupt:
            print("interrupted; the same command resumes from the last finished band", file=sys.stderr)
            raise SystemExit(130) from None


if __name__ == "__main__":
    main()
