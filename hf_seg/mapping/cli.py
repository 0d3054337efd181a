"""Map scenes of any size: GeoTIFF in, GeoTIFF out.

    hf-seg-predict scene.tif map.tif --model org/name-or-folder
    hf-seg-predict 'scenes/*.tif' more_scenes/ maps/ --model runs/ensemble --tta flips --confidence --preview
    accelerate launch -m hf_seg.mapping.cli scenes/ maps/ --model runs/ensemble

The last argument is the map, or the folder of the maps where there are several scenes. Several processes share the
scenes, or the bands of each where there are fewer scenes than processes. A killed run goes on with the same command;
scenes that have a map are passed over.
"""

import argparse
import dataclasses
import glob
import logging
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import rasterio
import torch
from accelerate import PartialState
from transformers.utils.logging import disable_progress_bar

from hf_seg.errors import UserError, one_line_errors
from hf_seg.inference.predict import PRECISIONS, Predictor
from hf_seg.inference.tta import TTA_PRESETS
from hf_seg.mapping.job import MapJob
from hf_seg.mapping.options import RasterOptions
from hf_seg.mapping.raster import GDAL_CACHE, find_networks, map_scene
from hf_seg.mapping.scene import UNITS
from hf_seg.settings import nearest

logger = logging.getLogger(__name__)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:  # argparse would print all flags and exit
        raise UserError(f"{message}; --help lists the settings")


def _band_numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"bands are numbers joined by commas, as in 4,3,2; got {text!r}") from None


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, RasterOptions]:
    """Read the command line.

    Raises:
        UserError: an unknown flag (with the nearest known one) or a value that cannot be.
    """
    description = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog="hf-seg-predict", description=__doc__, formatter_class=description, allow_abbrev=False)
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="scenes: files, folders, patterns in quotes")
    parser.add_argument("destination", metavar="DESTINATION", help="the map, or the folder of the maps")
    parser.add_argument("--model", required=True, help="folder or Hub id of a trained network or an ensemble")
    parser.add_argument("--window", type=int, help="side of the window in pixels; default: the crop of the training")
    parser.add_argument("--tta", default="none", choices=TTA_PRESETS, help="test-time augmentation (none)")
    parser.add_argument("--mixed_precision", default="no", choices=tuple(PRECISIONS), help="no")
    special: dict[str, dict[str, Any]] = {
        "bands": {"type": _band_numbers, "metavar": "N[,N,N]"},
        "units": {"choices": UNITS},
        "stretch": {"type": float, "nargs": 2, "metavar": ("LOW", "HIGH")},
        "polygons": {"metavar": "FILE"},
    }
    names = [field.name for field in dataclasses.fields(RasterOptions)]
    for field in dataclasses.fields(RasterOptions):
        text, default = field.metadata["help"], field.default
        if isinstance(default, bool):
            flag = f"--no_{field.name}" if default else f"--{field.name}"
            text = f"without this, {text}" if default else text
            parser.add_argument(flag, dest=field.name, action=f"store_{not default}".lower(), help=text)
            continue
        settings = special.get(field.name, {"type": type(default)})
        text = text if default is None else f"{text} ({default})"
        parser.add_argument(f"--{field.name}", default=default, help=text, **settings)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        known = [flag for action in parser._actions for flag in action.option_strings]
        raise UserError(f"unknown setting {unknown[0]!r}{nearest(unknown[0].split('=')[0], known)}")
    return args, RasterOptions(**{name: getattr(args, name) for name in names})


def find_scenes(sources: Sequence[str]) -> list[str]:
    """Return the scenes that files, folders (their .tif and .tiff) and patterns stand for, each once, in order.

    Raises:
        UserError: a folder without GeoTIFFs, or a pattern that nothing matches.
    """
    scenes: list[str] = []
    for source in sources:
        if Path(source).is_dir():
            found = [str(path) for path in sorted(Path(source).iterdir()) if path.suffix.lower() in (".tif", ".tiff")]
            missing = f"{source} is a folder without .tif or .tiff files"
        elif glob.has_magic(source) and not Path(source).exists():
            found, missing = sorted(glob.glob(source, recursive=True)), f"nothing matches {source}"
        else:
            found, missing = [source], ""
        if not found:
            raise UserError(missing)
        scenes += found
    return list(dict.fromkeys(scenes))


def pair_targets(scenes: Sequence[str], destination: str, *, overwrite: bool) -> list[tuple[str, Path]]:
    """Give each scene its map; where there are several, those that have one already are left out.

    Raises:
        UserError: several scenes and one file, or two scenes whose maps would have one name.
    """
    target = Path(destination)
    is_folder = target.is_dir() or destination.endswith("/")
    if len(scenes) == 1 and not is_folder:
        return [(scenes[0], target)]
    if target.suffix.lower() in (".tif", ".tiff") or target.is_file():
        raise UserError(f"{len(scenes)} scenes cannot go to one file, {destination}; name a folder")
    pairs: dict[Path, str] = {}
    for scene in scenes:
        path = target / f"{Path(scene).stem}.tif"
        if path in pairs:
            raise UserError(f"{pairs[path]} and {scene} would both be mapped to {path}; map them in two runs")
        pairs[path] = scene
    done = [path for path in pairs if path.exists() and not overwrite]
    if done and len(scenes) > 1:
        logger.info("%d of %d scenes are passed over, their maps are there: %s ...", len(done), len(pairs), done[0])
        pairs = {path: scene for path, scene in pairs.items() if path not in done}
    return [(scene, path) for path, scene in pairs.items()]


def map_together(
    predictor: Predictor, source: str, destination: Path, options: RasterOptions, state: PartialState
) -> None:
    """Map one scene in all processes, each a part of its bands."""
    with rasterio.Env(GDAL_CACHEMAX=GDAL_CACHE), closing(MapJob(predictor, source, destination, options)) as job:
        if state.is_main_process:
            job.prepare()
        state.wait_for_everyone()
        missing = job.missing()
        state.wait_for_everyone()  # nobody adds bands before everybody has seen which are missing
        mine = np.array_split(np.array(missing, dtype=int), state.num_processes)[state.process_index]
        job.compute(mine.tolist(), show_progress=state.is_main_process)
        state.wait_for_everyone()
        if state.is_main_process:
            print(job.finish(), flush=True)
        state.wait_for_everyone()


def map_apart(
    predictor: Predictor, pairs: Sequence[tuple[str, Path]], options: RasterOptions, *, show_progress: bool
) -> list[str]:
    """Map scenes one after the other; a scene that cannot be mapped does not stop the others.

    Returns:
        The errors.
    """
    errors = []
    for source, destination in pairs:
        try:
            print(map_scene(predictor, source, destination, options, show_progress=show_progress), flush=True)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            errors.append(str(error))
    return errors


def run(argv: Sequence[str] | None = None) -> None:
    """Parse, load, map.

    Raises:
        UserError: see `parse`, `find_scenes`, `pair_targets`, `hf_seg.predict_raster`.
    """
    args, options = parse(argv)
    scenes = find_scenes(args.sources)
    state = PartialState(cpu=not torch.accelerator.is_available())
    logging.basicConfig(level=logging.INFO if state.is_main_process else logging.ERROR, format="%(message)s")
    logging.getLogger("rasterio").setLevel(logging.ERROR)  # its errors reach us as exceptions
    disable_progress_bar()
    pairs = pair_targets(scenes, args.destination, overwrite=options.overwrite)
    if len(scenes) > 1 and options.polygons is not None and Path(options.polygons).suffix:
        raise UserError(
            f"--polygons {options.polygons} is one file for {len(scenes)} scenes; name the kind only: .gpkg"
        )
    if not pairs:
        return
    predictor = Predictor(
        find_networks(args.model, window=args.window),
        device=state.device,
        tta=args.tta,
        mixed_precision=args.mixed_precision,
    )
    if len(pairs) < state.num_processes:
        for source, destination in pairs:
            map_together(predictor, source, destination, options, state)
        return
    if len(scenes) == state.num_processes == 1:
        print(map_scene(predictor, *pairs[0], options), flush=True)
        return
    mine = pairs[state.process_index :: state.num_processes]
    errors = map_apart(predictor, mine, options, show_progress=state.is_main_process)
    state.wait_for_everyone()
    if errors:
        raise UserError(
            errors[0] if len(scenes) == 1 else f"{len(errors)} of {len(mine)} scenes have no map, see above"
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; a mistake is one line on stderr and exit code 2."""
    with one_line_errors():
        try:
            run(argv)
        except KeyboardInterrupt:
            print("interrupted; the same command goes on from the last finished band", file=sys.stderr)
            raise SystemExit(130) from None


if __name__ == "__main__":
    main()
