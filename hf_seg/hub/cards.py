"""Cards for the Hub: a template of `model_cards/`, filled with what was measured."""

from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData

from hf_seg.data.label_shards import CONFIDENCE_STEP, write_whole
from hf_seg.labels import IGNORE_INDEX, LABEL2ID


def write_pseudo_label_card(template: Path, destination: Path, summary: dict[str, Any]) -> None:
    """Write the README.md of a dataset of pseudo-labels, by whose header stock `load_dataset` finds the shards.

    Args:
        template: a Jinja template that begins with the header `--- {{ card_data }} ---`.
        destination: the file to write, whole or not at all.
        summary: what `manifest.json` says of models, settings and pixels.
    """
    split = summary["settings"]["split"]
    # datasets names its cache by the header alone: without the digest, new labels in an old place would not be read
    config: dict[str, Any] = {"config_name": "default", "description": f"labels {summary['labels_sha256']}"}
    config["data_files"] = [{"split": split, "path": f"data/{split}-*.parquet"}]
    header = DatasetCardData(
        pretty_name="Land-cover pseudo-labels of OpenEarthMap-SAR",
        license="other",
        task_categories=["image-segmentation"],
        tags=["remote-sensing", "land-cover", "pseudo-labels"],
        configs=[config],
    )
    constants: dict[str, Any] = {"ids": LABEL2ID, "ignore_index": IGNORE_INDEX, "confidence_step": CONFIDENCE_STEP}
    card = DatasetCard.from_template(header, template_path=str(template), **summary, **constants)
    write_whole(destination, card.content.encode())
