"""Cards for the Hub: a template of `model_cards/`, filled with what was measured.

A model's card is made from what lies in its folder alone, so a figure that was not measured cannot get into it.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import DatasetCard, DatasetCardData, EvalResult, ModelCard, ModelCardData

from hf_seg.arguments import FREE_ON_RESUME
from hf_seg.data.pseudo_label_dataset import CONFIDENCE_STEP, write_whole
from hf_seg.errors import UserError
from hf_seg.labels import CLASS_NAMES, IGNORE_INDEX, LABEL2ID, PALETTE

TEMPLATES = Path(__file__).parents[2] / "model_cards"  # beside the package: cards are made in a checkout
# Tiles with image and label in the releases' splits; other numbers are other data in the same layout.
_N_RELEASED = {"OpenEarthMap": {2303, 384, 3000, 500}, "OpenEarthMap-SAR": {4333, 210, 490}}
_DATASETS = {"source": "OpenEarthMap", "target": "OpenEarthMap-SAR"}
_UNTOLD = (FREE_ON_RESUME - {"max_train_steps"}) | {"pseudo_labels", "members", "weights", "eval"}
_CAPTIONS = {
    "curves": "Losses and validation mIoU over the steps",
    "confusion_matrix": "Confusion matrix",
    "panel": "Image, label and prediction of a few validation tiles",
    "members": "IoU of the members and of the ensemble",
    "uncertainty": "Entropy of the mean, label and prediction of the same tiles",
}


@dataclass(frozen=True)
class _Scores:
    """One column of the table of results."""

    title: str
    dataset: str  # "OpenEarthMap" | "OpenEarthMap-SAR": the layout of the tiles that it was scored on
    values: dict[str, Any]  # as `eval_results.json` has them

    @property
    def is_released(self) -> bool:
        return self.values["n_images"] in _N_RELEASED[self.dataset]


def write_model_card(folder: Path) -> None:
    """Write the README.md of a model's or an ensemble's folder from what lies in it, whole or not at all.

    Args:
        folder: with `recipe.yaml`, and as far as they were made `eval_results.json`, `figures/` and `student/`.

    Raises:
        UserError: the templates are not there, or the folder holds no model.
    """
    if not TEMPLATES.is_dir():
        raise UserError(f"no card templates in {TEMPLATES}; run from a checkout: pip install -e .")
    if not (folder / "recipe.yaml").exists():
        raise UserError(f"{folder} has no recipe.yaml, which says how its model was made")
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    if (folder / "ensemble.json").exists():
        template, header, facts = _describe_ensemble(folder, recipe)
    elif (folder / "config.json").exists():
        template, header, facts = _describe_network(folder, recipe)
    else:
        raise UserError(f"{folder} holds no model: neither config.json nor ensemble.json")
    facts["settings"] = {key: value for key, value in recipe.items() if key not in _UNTOLD}
    facts["class_rows"] = [(index, name, bytes(PALETTE[index]).hex().upper()) for index, name in enumerate(CLASS_NAMES)]
    facts |= {"name": folder.as_posix(), "title": header.model_name, "figures": list(_figures(folder))}
    loader = jinja2.FileSystemLoader(TEMPLATES)
    environment = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined)  # noqa: S701 (no HTML)
    body = re.sub(r"\n{3,}", "\n\n", environment.get_template(template).render(facts)).strip()
    write_whole(folder / "README.md", str(ModelCard(f"---\n{header.to_yaml()}\n---\n\n{body}\n")).encode())


def _describe_network(folder: Path, recipe: dict[str, Any]) -> tuple[str, ModelCardData, dict[str, Any]]:
    """Return template, header and facts of a single network; stage 1 has two, and data of two domains."""
    config, stage = _read_json(folder / "config.json"), 1 if "source_dir" in recipe else 2
    encoder = config.get("backbone_config") or config
    has_student = (folder / "student" / "config.json").exists()
    columns = []
    for role, place in {"teacher": folder, "student": folder / "student"}.items() if has_student else [("", folder)]:
        results = _read_json(place / "eval_results.json")
        domains = {"source": results, "target": results.get("target")} if stage == 1 else {"target": results}
        for domain, scores in domains.items():
            if scores:
                title = ", ".join(filter(None, (role, domain if stage == 1 else "")))
                columns.append(_Scores(title or "IoU", _DATASETS[domain], scores))
    name = str(recipe["model_name_or_path"])
    base_model = None if recipe["from_scratch"] else _hub_id(name)
    labels = recipe.get("pseudo_labels")
    losses = {"ce": "cross entropy", "rce": "reverse cross entropy", "lovasz": "Lovász-softmax"}
    losses = {key: loss for key, loss in losses.items() if recipe.get(f"{key}_weight")}
    header = _header(
        f"{_network_name(config)} for {'optical' if stage == 1 else 'SAR'} land cover",
        [scores for scores in columns if not scores.title.startswith("student")],
        ["optical" if stage == 1 else "sar", encoder["model_type"]],
        library_name="transformers",
        base_model=base_model,
        datasets=[identifier] if labels and (identifier := _hub_id(labels)) else None,
    )
    facts = {"stage": stage, "has_student": has_student, "config": config, "encoder": encoder}
    facts |= {"losses": list(losses.values()), "pseudo_labels": labels and (_hub_id(labels) or Path(labels).name)}
    facts |= {"base_model": base_model, "is_toy": name.startswith("toy-")}
    facts["crop"] = _read_json(folder / "preprocessor_config.json")["size"]["height"]
    return f"{config['model_type']}.md", header, facts | _results_facts(columns)


def _describe_ensemble(folder: Path, recipe: dict[str, Any]) -> tuple[str, ModelCardData, dict[str, Any]]:
    """Return template, header and facts of an ensemble."""
    members = [dict(member) for member in _read_json(folder / "ensemble.json")["members"]]
    for member in members:
        if member["revision"] is None:  # a folder: where it lay is nobody's business
            member["origin"] = Path(member["origin"]).name
        member["network"] = _network_name(_read_json(folder / member["folder"] / "config.json"))
    results, columns = _read_json(folder / "eval_results.json"), []
    if results:
        scores = [*zip((member["folder"] for member in members), results["members"], strict=True)]
        columns = [_Scores(title, "OpenEarthMap-SAR", {**results, **own}) for title, own in scores]
        columns.append(_Scores("ensemble", "OpenEarthMap-SAR", results))
    image_kind = "SAR" if recipe["column"] == "sar" else "optical"
    header = _header(
        f"Ensemble of {len(members)} for {image_kind} land cover",
        columns[-1:],
        [recipe["column"], "ensemble"],
        library_name="hf_seg",
        split=recipe["split"],
    )
    return "ensemble.md", header, {"members": members, "image_kind": image_kind, **_results_facts(columns)}


def _header(title: str, columns: list[_Scores], tags: list[str], *, split: str = "val", **more: Any) -> ModelCardData:
    """Return the card's metadata, by which the Hub shows the metrics."""
    results = []
    for scores in columns:
        slug = scores.dataset.lower()
        name = (
            scores.dataset
            if scores.is_released
            else f"{scores.values['n_images']} tile(s) laid out as {scores.dataset}"
        )
        for key, metric in (("mean_iou", "mean IoU"), ("overall_accuracy", "overall accuracy")):
            results.append(
                EvalResult(
                    task_type="image-segmentation",
                    dataset_type=slug if scores.is_released else f"like-{slug}",
                    dataset_name=name,
                    dataset_split=split,
                    metric_type="mean_iou" if key == "mean_iou" else "accuracy",
                    metric_name=metric,
                    metric_value=scores.values[key],
                )
            )
    return ModelCardData(
        model_name=title,
        license="other",
        license_name="terms-of-the-training-data",
        pipeline_tag="image-segmentation",
        tags=["remote-sensing", "land-cover", *tags],
        metrics=["mean_iou", "accuracy"],
        eval_results=results or None,
        **more,
    )


def _results_facts(columns: list[_Scores]) -> dict[str, Any]:
    """Return the table, and what to call the data: the release by its name only if as many tiles were scored."""
    is_released = any(scores.is_released for scores in columns)
    data = {name: name if is_released else f"data laid out as {name}" for name in _N_RELEASED}
    scored_on = " and ".join(data[name] for name in dict.fromkeys(scores.dataset for scores in columns))
    return {"columns": [(scores.title, scores.values) for scores in columns], "data": data, "scored_on": scored_on}


def _hub_id(name: str) -> str | None:
    """Return the id of what was fetched from the Hub, None of what is a folder here, or a preset."""
    identifier = name.partition("@")[0]
    return None if Path(name).exists() or identifier.count("/") != 1 else identifier


def _network_name(config: dict[str, Any]) -> str:
    names = {"segformer": "SegFormer", "upernet": "UperNet", "convnextv2": "ConvNeXtV2", "swinv2": "SwinV2"}
    types = (config["model_type"], (config.get("backbone_config") or {}).get("model_type"))
    return " ".join(names.get(kind, kind) for kind in types if kind)


def _figures(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield path and caption of the figures that a card shows, curves first, then domain by domain."""
    found = [*folder.glob("figures/*.png"), *folder.glob("figures/*/*.png")]
    known = [path for path in found if path.stem in _CAPTIONS]
    for path in sorted(known, key=lambda path: (path.parent.as_posix(), [*_CAPTIONS].index(path.stem))):
        domain = f" ({path.parent.name})" if path.parent.name in _DATASETS else ""
        yield path.relative_to(folder).as_posix(), _CAPTIONS[path.stem] + domain


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


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
