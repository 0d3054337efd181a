"""Pseudo-labels: label the optical half of OpenEarthMap-SAR with one or more stage-1 networks, as a dataset.

    accelerate launch -q --config_file recipes/accelerate_configs/one_process.yaml recipes/pseudo_label.py \\
        --model runs/stage1_b3 runs/stage1_b5 --tta flips --data_dir data/dfc25_track1 --output_dir runs/labels

`load_dataset("runs/labels")` gives rows {image_id, pseudo_label, confidence}; stage 2 takes them as `--pseudo_labels
runs/labels`. Probabilities are averaged over the networks and over the views of `--tta`, and the largest wins. Ignored
(255) are pixels without optical data (every band 0) and, by flag, pixels outside the SAR swath, pixels on which the
networks disagree, and pixels of little confidence. With `--column sar` networks of stage 2 label the SAR half, for a
second round.

The shards are shared among the processes, and the result does not depend on their number. Each shard is written
atomically: after a kill the same command resumes. `manifest.json` comes last and marks a complete dataset.
"""

from hf_seg.arguments import (
    PREDICTION_MEMORY_HINT,
    PseudoLabelArguments,
    check_same_recipe,
    result_settings,
    write_recipe,
)
from hf_seg.settings import answer_help, parse_arguments

if __name__ == "__main__":
    answer_help(PseudoLabelArguments)  # before the slow imports

import hashlib
import json
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from tqdm import tqdm

from hf_seg.bands import Bands
from hf_seg.data.nodata import outside_swath
from hf_seg.data.open_earth_map import load_open_earth_map_sar
from hf_seg.data.provenance import find_label_set, read_provenance
from hf_seg.data.pseudo_label_dataset import (
    LabelledTile,
    check_inputs,
    damaged_files,
    is_complete,
    plan_shards,
    read_maps,
    summarize,
    write_manifest,
    write_shard,
)
from hf_seg.data.samples import UnlabelledImages, UnlabelledSample
from hf_seg.errors import one_line_errors
from hf_seg.files import write_atomic
from hf_seg.hub.cards import write_pseudo_label_card
from hf_seg.hub.export import write_training_data
from hf_seg.hub.push import publish
from hf_seg.inference.load import LoadedNetwork, common_label_set, load_networks
from hf_seg.inference.predict import Predictor
from hf_seg.inference.vote import VoteAccumulator
from hf_seg.label_sets import require_same_classes
from hf_seg.labels import IGNORE_INDEX, LabelSet
from hf_seg.report.panels import plot_panel
from hf_seg.terminal import print_summary
from hf_seg.training.hub_data import pin_datasets
from hf_seg.training.run import start_accelerator, use_folder


def main(argv: list[str] | None = None) -> None:
    """Label, in a folder that no other run may use meanwhile."""
    args = parse_arguments(PseudoLabelArguments, argv)
    waiting = InitProcessGroupKwargs(timeout=timedelta(days=1))  # for the process that makes the last shard
    accelerator = start_accelerator(args, args.mixed_precision, kwargs_handlers=[waiting])
    with use_folder(accelerator, Path(args.output_dir)):
        label(args, accelerator)


def label(args: PseudoLabelArguments, accelerator: Accelerator) -> None:
    """Label what is missing, shard by shard, then describe the dataset."""
    output_dir = Path(args.output_dir)
    pin_datasets(args, accelerator, output_dir / "recipe.yaml")

    # Tiles and networks
    with accelerator.main_process_first():  # the first process fetches and indexes, the others find it done
        networks = find_networks(args)
        label_set = find_label_set(args.data_dir, "OpenEarthMap-SAR", args.label_set)
        classes, hint = common_label_set(networks).names, "; give the --label_set that the networks were trained with"
        require_same_classes(classes, label_set.names, networks[0].origin, "the dataset", hint)
        rows = load_open_earth_map_sar(args.data_dir, args.split, label_set=label_set)
    images, sar = UnlabelledImages(rows, args.column, bands=networks[0].bands), load_sar(rows, args)
    models = [{"name": each.name, "revision": each.revision, "sha256": each.sha256} for each in networks]
    inputs = {"models": models, "image_ids": images.image_ids}
    check_inputs(output_dir, inputs)
    check_same_recipe(args, output_dir / "recipe.yaml")
    for network in networks:  # what is wrong with one of them shows now, not after hours
        network.network()

    # What is missing
    shards = plan_shards(output_dir / "data", args.split, len(rows), args.tiles_per_shard)
    damaged = damaged_files(output_dir)
    missing = [path for path in shards if path in damaged or not is_complete(path)]
    accelerator.wait_for_everyone()  # all have seen the same before the first one writes
    if accelerator.is_main_process:
        for path in damaged:
            path.unlink(missing_ok=True)  # before the manifest, which alone tells that it is damaged
        if missing:  # else the dataset stays complete while it is described again
            (output_dir / "manifest.json").unlink(missing_ok=True)
        write_recipe(args, output_dir)
        write_atomic(output_dir / "inputs.json", json.dumps(inputs, indent=1))
        write_training_data(output_dir, {"target": read_provenance(args.data_dir, "OpenEarthMap-SAR")})
    accelerator.wait_for_everyone()
    accelerator.print(
        f"{len(rows)} tiles in {len(shards)} shards, {len(shards) - len(missing)} of them complete and kept; "
        f"{len(networks)} network(s), tta: {args.tta}, {accelerator.num_processes} process(es), {accelerator.device}"
    )

    # Label, then describe the dataset
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    label_shards({path: shards[path] for path in mine}, images, sar, networks, args, accelerator)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if not (output_dir / "figures" / "panel.png").exists():  # it is drawn last
            draw_figures(rows, images, shards, output_dir / "figures", label_set)
        describe_dataset(shards, inputs, args, label_set)
    accelerator.end_training()
    if accelerator.is_main_process:
        try:
            publish(output_dir, args)
        finally:  # the labels are complete, although their push may have failed
            print_summary(
                "",
                {"output_dir": output_dir, "n_tiles": len(rows)},
                [output_dir / "README.md", output_dir / "figures" / "panel.png"],
                hints=[f"hf-seg stage2 --pseudo_labels {output_dir}"],
            )


def load_sar(rows: datasets.Dataset, args: PseudoLabelArguments) -> UnlabelledImages:
    """Load the SAR tiles, of which only the places without data are needed."""
    names = (read_provenance(args.data_dir, "OpenEarthMap-SAR")["bands"] or {}).get("sar")
    any_stretch = None if names is None else Bands(tuple(names), (0.0,) * len(names), (1.0,) * len(names))
    return UnlabelledImages(rows, "sar", bands=any_stretch)


def find_networks(args: PseudoLabelArguments) -> list[LoadedNetwork]:
    """Find the networks that label: several are left on disk, one is kept in memory.

    Raises:
        UserError: one was not found; or agreement of a single network was asked for.
    """
    subfolder = "student" if args.network == "student" else ""
    networks = [each for name in args.model for each in load_networks(name, subfolder=subfolder, low_memory=True)]
    args.require("combine", args.combine == "average" or len(networks) > 1, "average for a single network")
    if len(networks) == 1:
        networks[0].module = networks[0].network()
    return networks


class Images(Sequence[np.ndarray]):
    """Some tiles' images, each read when it is asked for."""

    def __init__(self, images: UnlabelledImages, tiles: range) -> None:
        self.images, self.tiles = images, tiles

    def __len__(self) -> int:
        return len(self.tiles)

    def __getitem__(self, index: Any) -> Any:
        return self.images[self.tiles[index]].image


def label_shards(
    shards: dict[Path, range],
    images: UnlabelledImages,
    sar: UnlabelledImages,
    networks: list[LoadedNetwork],
    args: PseudoLabelArguments,
    accelerator: Accelerator,
) -> None:
    """Write this process's shards; in memory are one network and the sums of one shard, however many there are."""
    predictor = Predictor.with_settings(networks, args, device=accelerator.device)
    passes = sum(map(len, shards.values())) * len(networks)
    hide_progress = passes == 0 or not accelerator.is_main_process
    with tqdm(total=passes, unit="tile", desc="labels", disable=hide_progress) as bar:
        for path, tiles in shards.items():
            accumulators = predictor.predict_all(
                Images(images, tiles), keep_on=torch.device("cpu"), on_image=bar.update
            )
            write_shard(
                path,
                [
                    label_tile(images[tile], sar[tile].image, accumulator, args)
                    for tile, accumulator in zip(tiles, accumulators, strict=True)
                ],
            )


def label_tile(
    sample: UnlabelledSample, sar: np.ndarray, accumulator: VoteAccumulator, args: PseudoLabelArguments
) -> LabelledTile:
    """Choose the label of each pixel, or the reason why it has none."""
    label_map, confidence = accumulator.label_map().numpy(), accumulator.confidence().numpy()
    nowhere = np.zeros(label_map.shape, dtype=bool)
    has_data = sample.valid_mask if args.column == "optical" else ~outside_swath(sar)  # a shadow in SAR is data
    reasons = {
        "no SAR data" if args.column == "sar" else "no optical data": ~has_data,
        "outside the SAR swath": outside_swath(sar) if args.mask_nodata else nowhere,
        "networks disagree": accumulator.disagreement().numpy() > 0 if args.combine == "agreement" else nowhere,
        "little confidence": confidence < args.min_confidence,
    }
    num_labels = accumulator.probs().shape[-3]
    reason = np.select(list(reasons.values()), range(1, 1 + len(reasons)))  # the first that holds; 0: labelled
    label = np.where(reason, np.uint8(IGNORE_INDEX), label_map)
    return LabelledTile(
        sample.image_id,
        label,
        confidence,
        predicted=np.bincount(label_map[has_data], minlength=num_labels),
        kept=np.bincount(label[reason == 0], minlength=num_labels),
        ignored={name: int((reason == number).sum()) for number, name in enumerate(reasons, start=1)},
    )


def draw_figures(
    rows: datasets.Dataset, images: UnlabelledImages, shards: dict[Path, range], folder: Path, label_set: LabelSet
) -> None:
    """Draw confidence, then the image, beside official and pseudo-label of a few evenly spread tiles."""
    panel, confidences = [], []
    for index in np.unique(np.linspace(0, len(rows) - 1, 4).round().astype(int)).tolist():
        path, tiles = next((path, tiles) for path, tiles in shards.items() if index in tiles)
        label, confidence = read_maps(path, index - tiles.start)
        image_id, image, _ = images[index]
        official = rows[index]["label"]
        official = None if official is None else label_set.to_ids(np.array(official))
        panel.append((image_id, image, official, label))
        confidences.append((image_id, np.dstack([confidence] * 3), official, label))
    names = ("label of the data", "pseudo-label")
    plot_panel(confidences, folder / "confidence.png", titles=("confidence, white = 1", *names), label_set=label_set)
    titles = ("SAR" if images.column == "sar" else images.column, *names)
    plot_panel(panel, folder / "panel.png", titles=titles, label_set=label_set)


def describe_dataset(
    shards: dict[Path, range], inputs: dict[str, Any], args: PseudoLabelArguments, label_set: LabelSet
) -> None:
    """Write the dataset card and, last of all, the manifest."""
    settings = result_settings(args)
    summary = {
        "models": inputs["models"],
        "settings": settings,
        "settings_sha256": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
        "n_tiles": len(inputs["image_ids"]),
        **summarize(list(shards), label_set),
    }
    write_pseudo_label_card(Path(args.output_dir), summary)
    write_manifest(Path(args.output_dir), summary)


if __name__ == "__main__":
    with one_line_errors(f"{PREDICTION_MEMORY_HINT} or --tiles_per_shard; the same command resumes"):
        main()
