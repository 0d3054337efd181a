"""Map scenes of any size: GeoTIFF in, GeoTIFF out.

    hf-seg predict scene.tif map.tif --model org/name-or-folder
    hf-seg predict 'scenes/*.tif' more_scenes/ maps/ --model runs/ensemble --tta flips --confidence --preview
    torchrun --nproc_per_node 4 -m hf_seg.mapping.cli scenes/ maps/ --model runs/ensemble

The last argument is the map, or the folder of the maps if there are several scenes. Several processes share the scenes,
or the bands of each scene if there are fewer scenes than processes. The same command for several scenes, started any
number of times on machines that share the folder of the maps, maps each scene once. A killed run resumes with the same
command; scenes that already have a map are skipped.
"""

import argparse
import contextlib
import glob
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_seg.errors import UserError, file_errors, one_line_errors, print_error
from hf_seg.mapping.options import RasterOptions
from hf_seg.processes import end_with_launcher
from hf_seg.settings import Parser, filled
from hf_seg.terminal import print_summary

logger = logging.getLogger(__name__)

SUFFIXES = (".tif", ".tiff")
MEMORY_HINT = "lower --batch_size or --window; the same command resumes from the last finished band"
MODEL_HELP = "folder or Hub id of a trained network or an ensemble, or a file .onnx of scripts/export_model.py"


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, RasterOptions]:
    """Read the command line.

    Raises:
        UserError: an unknown flag (with the nearest known one), or a missing or wrong value.
    """
    parser = Parser(prog="hf-seg predict", description=__doc__)
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="scenes: files, folders, or patterns in quotes")
    parser.add_argument("destination", metavar="DESTINATION", help="the map, or the folder of the maps")
    parser.add_argument("--model", required=True, help=MODEL_HELP)
    parser.add_settings(RasterOptions)
    actions = {action.dest: action for action in parser._actions}
    # these end with their last number, so that scenes may follow
    actions["bands"].nargs, actions["bands"].type, actions["bands"].metavar = None, _band_numbers, "N [N N]"
    actions["stretch"].nargs, actions["stretch"].metavar = 2, ("LOW", "HIGH")
    args = parser.parse_args(_join_bands(sys.argv[1:] if argv is None else argv))
    return args, filled(RasterOptions, args)


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
                found = [str(path) for path in files if path.suffix.lower() in SUFFIXES]
            elif glob.has_magic(source) and not Path(source).exists():
                found = sorted(glob.glob(source, recursive=True))
            else:
                found = [source]
        if not found:
            raise UserError(f"{source}: no scenes found; name files, a pattern, or a folder of .tif or .tiff files")
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
        if target.suffix.lower() in SUFFIXES or target.is_file():
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

    import torch  # these are slow to import
    from accelerate import PartialState
    from transformers.utils.logging import disable_progress_bar

    from hf_seg.inference.predict import Predictor
    from hf_seg.mapping.claims import clear_finished, last_change, share_scenes
    from hf_seg.mapping.job import bands_folder, map_scene
    from hf_seg.mapping.raster import find_networks

    end_with_launcher()
    state = PartialState(cpu=not torch.accelerator.is_available())
    logging.basicConfig(level=logging.INFO if state.is_main_process else logging.ERROR, format="%(message)s")
    logging.getLogger("rasterio").setLevel(logging.ERROR)  # its errors are raised as exceptions too
    disable_progress_bar()
    if state.is_main_process:
        for _, path in pair_targets(scenes, args.destination, overwrite=True):
            clear_finished(path, bands_folder(path))
    pairs = pair_targets(scenes, args.destination, overwrite=options.overwrite)
    replaced = {path: last_change(path) for _, path in pairs} if options.overwrite else {}
    state.wait_for_everyone()  # no process writes a map before all have listed the missing ones
    if not pairs:
        return
    networks = find_networks(args.model, window=options.window)
    predictor = Predictor(networks, device=state.device, tta=options.tta, mixed_precision=options.mixed_precision)
    failed = 0
    if len(scenes) == 1 or len(pairs) < state.num_processes:
        _map_together(predictor, pairs, options, state)
    else:
        pairs = pairs[state.process_index :: state.num_processes]

        def map_one(source: str, destination: Path) -> bool:
            try:
                summary = map_scene(predictor, source, destination, options, show_progress=state.is_main_process)
            except UserError as error:
                print_error(error)  # the other scenes are still mapped
                return False
            if summary is not None:
                print_summary(str(summary), summary.as_dict())
            return True

        failed = share_scenes(pairs, map_one, replaced=replaced)
    state.wait_for_everyone()
    if failed:
        raise UserError(f"{failed} of {len(pairs)} scenes have no map, see above")


def _map_together(predictor: Any, pairs: Sequence[tuple[str, Path]], options: RasterOptions, state: Any) -> None:
    """Map scenes one after the other, each by all processes of this launch; an error ends them all."""
    from hf_seg.mapping.claims import claim, require_claim
    from hf_seg.mapping.job import map_scene

    part = {"part": state.process_index, "parts": state.num_processes, "wait": state.wait_for_everyone}
    for source, destination in pairs:
        with claim(destination) if state.is_main_process else contextlib.nullcontext(True) as is_mine:
            require_claim(is_mine, destination)
            summary = map_scene(predictor, source, destination, options, show_progress=state.is_main_process, **part)
        if summary is not None:
            print_summary(str(summary), summary.as_dict())


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; a mistake is one line on stderr and exit code 2."""
    with one_line_errors(MEMORY_HINT):
        try:
            run(argv)
        except KeyboardInterrupt:
            print("interrupted; the same command resumes from the last finished band", file=sys.stderr)
            raise SystemExit(130) from None


if __name__ == "__main__":
    main()
