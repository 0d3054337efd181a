"""Pseudo-labels: label the optical half of OpenEarthMap-SAR with one or more stage-1 networks, as a dataset.

    accelerate launch recipes/pseudo_label.py --model runs/stage1_b3 runs/stage1_b5 --tta flips \\
        --data_dir data/dfc25_track1 --output_dir runs/labels
    accelerate launch recipes/stage2.py --pseudo_labels runs/labels ...

`load_dataset("runs/labels")` gives rows {image_id, pseudo_label, confidence}. Probabilities are averaged over the
networks and over the views of `--tta`, and the largest wins. Ignored (255) are pixels without optical data (every band
0) and, by flag, pixels beyond the SAR swath, on which the networks disagree, or of little confidence.

The shards are shared among the processes, and the result does not depend on their number. Each shard appears whole or
not at all: the same command goes on after a kill. `manifest.json` comes last and marks a whole dataset.
"""

import hashlib
import json
import logging
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from huggingface_hub import snapshot_download
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from hf_seg.arguments import FREE_ON_RESUME, PseudoLabelArguments, check_same_recipe, dump_recipe
from hf_seg.data.dataloaders import Sample, UnlabelledImages
from hf_seg.data.nodata import outside_swath
from hf_seg.data.open_earth_map import load_open_earth_map_sar
from hf_seg.data.pseudo_label_dataset import (
    LabelledTile,
    check_inputs,
    is_complete,
    plan_shards,
    read_maps,
    summarize,
    write_manifest,
    write_shard,
)
from hf_seg.errors import UserError, one_line_errors
from hf_seg.files import sha256_of, write_atomic
from hf_seg.hub.cards import write_pseudo_label_card
from hf_seg.hub.push import publish
from hf_seg.inference.tta import Votes
from hf_seg.labels import IGNORE_INDEX, NUM_LABELS
from hf_seg.models import SegmentationNetwork, load_trained
from hf_seg.report.plots import plot_panel
from hf_seg.settings import parse_arguments
from hf_seg.training.evaluation import predict_probs
from hf_seg.training.setup import require_login

CARD_TEMPLATE = Path(__file__).parents[1] / "model_cards" / "pseudo_labels.md"


class TrainedNetwork(NamedTuple):
    """One of the networks that label."""

    name: str  # as the user gave it
    revision: str | None  # commit on the Hub
    sha256: str  # of weights, config and processor: what it is, wherever it lies
    root: Path
    subfolder: str


def main(argv: list[str] | None = None) -> None:
    """Label what is missing, shard by shard, then describe the whole."""
    args = parse_arguments(PseudoLabelArguments, argv)
    has_fp16 = args.mixed_precision != "fp16" or torch.accelerator.is_available()
    args.require("mixed_precision", has_fp16, "no or bf16 on a CPU")
    waiting = InitProcessGroupKwargs(timeout=timedelta(days=1))  # for the process that makes the last shard
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(), mixed_precision=args.mixed_precision, kwargs_handlers=[waiting]
    )
    logging.basicConfig(level=logging.INFO if accelerator.is_main_process else logging.ERROR, format="%(message)s")
    disable_progress_bar()
    require_login(args, accelerator)
    output_dir = Path(args.output_dir)
    with accelerator.main_process_first():  # the first process fetches and indexes, the others find it done
        rows = load_open_earth_map_sar(args.data_dir, args.split)
        networks = [find_network(name, args.network) for name in args.model]
    optical, sar = UnlabelledImages(rows, "optical"), UnlabelledImages(rows, "sar")
    models = [{"name": each.name, "revision": each.revision, "sha256": each.sha256} for each in networks]
    inputs = {"models": models, "image_ids": optical.image_ids}
    check_inputs(output_dir, inputs)
    check_same_recipe(args, output_dir / "recipe.yaml")
    for network in networks:  # what is wrong with one of them shows now, not after hours
        load_trained(str(network.root), subfolder=network.subfolder)
    logging.getLogger("hf_seg.models").setLevel(logging.WARNING)
    shards = plan_shards(output_dir / "data", args.split, len(rows), args.tiles_per_shard)
    missing = [path for path in shards if not is_complete(path)]
    accelerator.wait_for_everyone()  # all have seen the same before the first one writes
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / "manifest.json").unlink(missing_ok=True)
        write_atomic(output_dir / "recipe.yaml", dump_recipe(args).encode())
        write_atomic(output_dir / "inputs.json", json.dumps(inputs, indent=1).encode())
    accelerator.wait_for_everyone()
    accelerator.print(
        f"{len(rows)} tiles in {len(shards)} shards, {len(shards) - len(missing)} of them whole and kept; "
        f"{len(networks)} network(s), views: {args.tta}, {accelerator.num_processes} process(es), {accelerator.device}"
    )
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    label_shards({path: shards[path] for path in mine}, optical, sar, networks, args, accelerator)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if not (output_dir / "figures" / "panel.png").exists():  # it is drawn last
            draw_figures(rows, shards, output_dir / "figures")
        describe_dataset(shards, inputs, args)
        print(f"pseudo-labels, card and figures: {output_dir}")
    accelerator.end_training()
    if accelerator.is_main_process:
        publish(output_dir, args)


def find_network(name: str, network: str) -> TrainedNetwork:
    """Find a stage-1 network in a folder or on the Hub, and say exactly which one it is.

    Args:
        name: a stage-1 output folder, or a Hub id; `id@revision` pins a commit, branch or tag.
        network: "teacher", which lies at the root, or "student", which lies in the folder of that name.

    Raises:
        UserError: no such folder or repository, or no student in it.
    """
    root, revision, subfolder = Path(name), None, "student" if network == "student" else ""
    if not root.exists():
        repository, _, wanted = name.partition("@")
        needed = ("config.json", "preprocessor_config.json", "model*.safetensors*")
        patterns = [f"{subfolder}/{file}".lstrip("/") for file in needed]
        try:
            root = Path(snapshot_download(repository, revision=wanted or None, allow_patterns=patterns))
        except Exception as error:  # the Hub's client raises many kinds; each is about this name
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"--model {name} is neither a folder nor to be had from the Hub now ({reason})") from None
        revision = root.name  # a snapshot is named by its commit
    folder = root / subfolder
    if subfolder and not (folder / "config.json").exists():
        raise UserError(f"--model {name} has no folder {subfolder}/; --network teacher labels with its teacher")
    files = sorted([*folder.glob("*config.json"), *folder.glob("*.safetensors")])
    digest = hashlib.sha256("".join(f"{file.name} {sha256_of(file)}\n" for file in files).encode())
    return TrainedNetwork(name, revision, digest.hexdigest(), root, subfolder)


def label_shards(
    shards: dict[Path, range],
    optical: UnlabelledImages,
    sar: UnlabelledImages,
    networks: list[TrainedNetwork],
    args: PseudoLabelArguments,
    accelerator: Accelerator,
) -> None:
    """Make this process's shards; in memory are one network and the sums of one shard, however many there are."""
    passes = sum(map(len, shards.values())) * len(networks)
    bar = tqdm(total=passes, unit="tile", desc="labels", disable=not (passes and accelerator.is_main_process))
    model: SegmentationNetwork | None = None
    for path, tiles in shards.items():
        votes = [Votes() for _ in tiles]
        for network in networks:
            if model is None or len(networks) > 1:
                model = None  # its memory goes before the next one's comes
                stock, window = load_trained(str(network.root), subfolder=network.subfolder)
                model = SegmentationNetwork(stock).to(accelerator.device).eval()
            stride = max(1, round(args.stride * window))
            settings: dict[str, Any] = {"window": window, "stride": stride, "batch_size": args.batch_size}
            for tile, tally in zip(tiles, votes, strict=True):
                tally.add(predict_probs(model, optical[tile].image, accelerator, **settings, views=args.tta))
                bar.update()
        labelled = [label_tile(optical[i], sar[i].image, tally, args) for i, tally in zip(tiles, votes, strict=True)]
        write_shard(path, labelled)
    bar.close()


def label_tile(optical: Sample, sar: np.ndarray, votes: Votes, args: PseudoLabelArguments) -> LabelledTile:
    """Decide on the label of each pixel, or why it has none."""
    choice, confidence, disagreement = (values.numpy() for values in votes.decide())
    has_ground = optical.label != IGNORE_INDEX
    holds = {
        "no optical data": ~has_ground,
        "beyond the SAR swath": outside_swath(sar) if args.ignore_sar_nodata else np.False_,
        "networks disagree": disagreement if args.combine == "agreement" else np.False_,
        "little confidence": confidence < args.min_confidence,
    }
    reason = np.select(list(holds.values()), range(1, 1 + len(holds)))  # the first that holds; 0: labelled
    label = np.where(reason, np.uint8(IGNORE_INDEX), choice)
    return LabelledTile(
        optical.image_id,
        label,
        confidence,
        predicted=np.bincount(choice[has_ground], minlength=NUM_LABELS),
        kept=np.bincount(label[reason == 0], minlength=NUM_LABELS),
        ignored={name: int((reason == number).sum()) for number, name in enumerate(holds, start=1)},
    )


def draw_figures(rows: datasets.Dataset, shards: dict[Path, range], folder: Path) -> None:
    """Draw confidence, then the optical image, beside official and pseudo-label of a few evenly spread tiles."""
    panel, confidences = [], []
    for index in np.unique(np.linspace(0, len(rows) - 1, 4).round().astype(int)).tolist():
        path, tiles = next((path, tiles) for path, tiles in shards.items() if index in tiles)
        label, confidence = read_maps(path, index - tiles.start)
        row = rows[index]
        official = None if row["label"] is None else np.array(row["label"])
        panel.append((row["image_id"], np.array(row["optical"]), official, label))
        confidences.append((row["image_id"], np.dstack([confidence] * 3), official, label))
    names = ("official label", "pseudo-label")
    plot_panel(confidences, folder / "confidence.png", titles=("confidence, white = 1", *names))
    plot_panel(panel, folder / "panel.png", titles=("optical", *names))


def describe_dataset(shards: dict[Path, range], inputs: dict[str, Any], args: PseudoLabelArguments) -> None:
    """Write the dataset card and, last of all, the manifest."""
    settings = {key: value for key, value in asdict(args).items() if key not in {*FREE_ON_RESUME, "config"}}
    summary = {
        "models": inputs["models"],
        "settings": settings,
        "settings_sha256": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
        "n_tiles": len(inputs["image_ids"]),
        **summarize(list(shards)),
    }
    write_pseudo_label_card(CARD_TEMPLATE, Path(args.output_dir, "README.md"), summary)
    write_manifest(Path(args.output_dir), summary)


if __name__ == "__main__":
    with one_line_errors():
        main()
