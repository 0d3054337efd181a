"""Replace the training labels of a synthetic dataset by pseudo-labels, in place.

    accelerate launch recipes/stage1.py --method source_only --seed 1 --output_dir runs/labeller ...
    accelerate launch recipes/pseudo_label.py --model runs/labeller --output_dir runs/labels ...
    python scripts/replace_labels.py --data_dir data/synthetic/dfc25_track1 --pseudo_labels runs/labels

The official labels of OpenEarthMap-SAR come from a network that was trained on OpenEarthMap only. So made, the noisy
labels of a synthetic dataset have the errors of a network, not simulated ones. Pixels without a pseudo-label become
background, which is not trained on. `dataset.json` then says where the labels come from.
"""

import json
from pathlib import Path

from hf_seg.errors import UserError, one_line_errors
from hf_seg.settings import Parser

KIND = "predicted by a network trained on the source"


def replace_labels(data_dir: Path, pseudo_labels: Path) -> int:
    """Write the pseudo-labels as GeoTIFFs in place of the training labels; return how many.

    Raises:
        UserError: not a synthetic dataset, a tile without a pseudo-label or of another size, or it cannot be written.
    """
    import numpy as np
    import rasterio

    from hf_seg.data.provenance import DATASET_FILE, read_provenance
    from hf_seg.data.pseudo_label_dataset import load_pseudo_labels
    from hf_seg.data.scan import scan_open_earth_map_sar
    from hf_seg.files import atomic_folder, write_atomic
    from hf_seg.labels import BACKGROUND, IGNORE_INDEX

    if not read_provenance(data_dir, "OpenEarthMap-SAR")["synthetic"]:
        raise UserError(f"--data_dir {data_dir} is not a synthetic dataset; other labels are never replaced")
    scan = scan_open_earth_map_sar(data_dir)
    predicted = load_pseudo_labels(str(pseudo_labels))
    index_of = {image_id: index for index, image_id in enumerate(predicted["image_id"])}
    rows = [row for row in scan.rows["train"] if row.files["label"]]
    with atomic_folder(scan.root / "train" / "labels") as folder:
        for image_id, files in rows:
            if image_id not in index_of:
                raise UserError(f"{pseudo_labels} has no pseudo-label of {image_id}; label the whole train split")
            label = np.array(predicted[index_of[image_id]]["pseudo_label"])
            label[label == IGNORE_INDEX] = BACKGROUND
            with rasterio.open(files["label"]) as replaced:
                profile = replaced.profile
            if label.shape != (profile["height"], profile["width"]):
                raise UserError(f"{pseudo_labels}: the pseudo-label of {image_id} has another size than its tile")
            with rasterio.open(folder / f"{image_id}.tif", "w", **profile) as file:
                file.write(label, 1)
    description = json.loads((scan.root / DATASET_FILE).read_text(encoding="utf-8"))
    description["labels"] = {**(description.get("labels") or {}), "train": KIND}
    write_atomic(scan.root / DATASET_FILE, json.dumps(description, indent=2) + "\n")
    return len(rows)


def main(arguments: list[str] | None = None) -> None:
    """Replace the labels; a user's mistake is one line on stderr."""
    parser = Parser(description=__doc__)
    parser.add_argument("--data_dir", metavar="DIR", type=Path, required=True, help="a synthetic OpenEarthMap-SAR")
    parser.add_argument("--pseudo_labels", metavar="DIR", type=Path, required=True, help="of recipes/pseudo_label.py")
    with one_line_errors():
        options = parser.parse_args(arguments)
        count = replace_labels(options.data_dir, options.pseudo_labels)
    print(f"{count} labels of {options.data_dir}: {KIND}")


if __name__ == "__main__":
    main()
