"""Cards for the Hub: a template in `model_cards/`, filled with what was measured.

A card is made from the files in its folder alone, so every figure in it was measured.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import yaml
from huggingface_hub import (
    DatasetCard,
    DatasetCardData,
    EvalResult,
    EvalResultEntry,
    ModelCard,
    ModelCardData,
    RepoCard,
    eval_result_entries_to_yaml,
)

from hf_seg.data.pseudo_label_dataset import CONFIDENCE_STEP
from hf_seg.errors import UserError
from hf_seg.files import remove, write_atomic
from hf_seg.hub.export import read_record, read_training_data, without_paths
from hf_seg.hub_client import one_line
from hf_seg.label_sets import hex_colors, label_set_of
from hf_seg.labels import IGNORE_INDEX
from hf_seg.report.page import without_tags
from hf_seg.settings import packaged_folder

Provenance = dict[str, Any]  # as `read_provenance` returns it
EVAL_RESULTS_FILE = ".eval_results/land_cover.yaml"


class _Column(NamedTuple):
    """One column of the table of results."""

    title: str
    scores: dict[str, Any]  # as in `eval_results.json`
    data: Provenance  # of the tiles that were scored


def write_model_card(folder: Path) -> None:
    """Write the README.md of a model's or an ensemble's folder from its files.

    Args:
        folder: with `recipe.yaml`, and where they exist `training_data.json`, `eval_results.json`, `report.json`,
            `figures/` and `student/`.

    Raises:
        UserError: the folder contains no model, or a file in it is damaged.
    """
    recipe = read_record(folder / "recipe.yaml")
    if not recipe:
        raise UserError(f"{folder} has no recipe.yaml, which says how its model was made")
    if (folder / "ensemble.json").exists():
        template, header, facts = _describe_ensemble(folder, recipe)
    elif (folder / "config.json").exists():
        template, header, facts = _describe_network(folder, recipe)
    else:
        raise UserError(f"{folder} contains no model: neither config.json nor ensemble.json")
    report = read_record(folder / "report.json")  # of scripts/report.py; it counts if it is of the same predictions
    intervals = report.get("intervals", {}).get("tiles", {})
    facts["intervals"] = [
        intervals.get("mean_iou") if column.scores.get("confusion_matrix") == report.get("confusion_matrix") else None
        for column in facts["columns"]
    ]
    facts |= {"name": folder.as_posix(), "title": header.model_name, "settings": recipe}
    network = folder / "member_0" if template == "ensemble.md" else folder
    label_set = label_set_of(read_record(network / "config.json"), folder.as_posix())
    colors = [color.lstrip("#").upper() for color in hex_colors(label_set)]
    facts["class_rows"] = [*zip(range(label_set.num_labels), label_set.names, colors, strict=True)]
    facts["figures"] = [path.relative_to(folder) for path in folder.glob("figures/**/*.png")]
    loader = jinja2.FileSystemLoader(packaged_folder("model_cards"))
    environment = jinja2.Environment(  # noqa: S701 (Markdown)
        loader=loader, undefined=jinja2.StrictUndefined, finalize=without_tags
    )
    body = re.sub(r"\n{3,}", "\n\n", environment.get_template(template).render(facts)).strip()
    write_atomic(folder / "README.md", str(ModelCard(f"---\n{header.to_yaml()}\n---\n\n{body}\n")))
    _write_eval_results(folder, header, [column.data for column in facts["columns"]])


def _write_eval_results(folder: Path, header: ModelCardData, scored: Sequence[Provenance]) -> None:
    """Write the scores on benchmarks of the Hub as its leaderboards read them; nothing for other data.

    The format takes datasets only that are benchmarks, and the id of a task that their `eval.yaml` declares.
    Source: https://huggingface.co/docs/hub/eval-results
    """
    tasks = {data["hub_id"]: data["benchmark_tasks"] or {} for data in scored}
    entries = [
        EvalResultEntry(
            dataset_id=result.dataset_type,
            task_id=tasks[result.dataset_type][result.dataset_split],
            value=result.metric_value,
            dataset_revision=result.dataset_revision,
            notes=f"{result.metric_name}, split {result.dataset_split}",
        )
        for result in header.eval_results or []
        if result.metric_type == "mean_iou" and result.dataset_split in tasks.get(result.dataset_type, {})
    ]
    remove(folder / EVAL_RESULTS_FILE)
    if entries:
        write_atomic(folder / EVAL_RESULTS_FILE, yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False))


def _require_settings(folder: Path, recipe: dict[str, Any], *keys: str) -> None:
    """Raise `UserError` unless a recipe has some settings."""
    for key in keys:
        if key not in recipe:
            raise UserError(f"{folder}/recipe.yaml has no {key}; it is not one that this project writes")


def _describe_network(folder: Path, recipe: dict[str, Any]) -> tuple[str, ModelCardData, dict[str, Any]]:
    """Return template, header and facts of a single network; stage 1 has two, and data of two domains."""
    _require_settings(folder, recipe, "model_name_or_path", "from_scratch")
    config, stage = read_record(folder / "config.json"), 1 if "method" in recipe else 2
    data = read_training_data(folder)
    has_student = (folder / "student" / "config.json").exists()
    columns = []
    is_pair = has_student and stage == 1
    for role, place in {"teacher": folder, "student": folder / "student"}.items() if is_pair else [("", folder)]:
        results = read_record(place / "eval_results.json")
        domains = {"source": results, "target": results.get("target")} if stage == 1 else {"target": results}
        for domain, scores in domains.items():
            if scores:
                title = ", ".join(filter(None, (role, domain if stage == 1 else "")))
                columns.append(_Column(title or "IoU", scores, data[domain]))

    # What the weights come from, each with terms of its own
    name, labels = str(recipe["model_name_or_path"]), recipe.get("pseudo_labels")
    base_model = None if recipe["from_scratch"] else name
    used = {"dacs": ["source", "target"], "source_only": ["source"], None: ["target"]}[recipe.get("method")]
    datasets = [data[domain] for domain in used]
    labels_id = labels and _hub_id(labels)
    other_terms = [each for each in (base_model and (_hub_id(base_model) or Path(base_model).name), labels_id) if each]
    moved = {
        "model_name_or_path": base_model,
        "pseudo_labels": labels,
        "label_set": recipe.get("label_set"),
    }  # in the recipe by their last part, if local

    encoder = config.get("backbone_config") or config
    header = _header(
        f"{_network_name(config)} for {'optical' if stage == 1 else 'SAR'} land cover",
        [column for column in columns if not column.title.startswith("student")],
        ["optical" if stage == 1 else "sar", encoder["model_type"]],
        library_name="transformers",
        base_model=base_model and _hub_id(base_model),
        datasets=_hub_datasets([labels_id], datasets),
        **_license(datasets, other_terms),
    )
    facts = {
        "stage": stage,
        "has_student": has_student,
        "config": config,
        "encoder": encoder,
        "data": data,
        "datasets": datasets,
        "columns": columns,
        "pseudo_labels": labels and (labels_id or Path(labels).name),
        "local": {key: Path(value).name for key, value in moved.items() if value and _hub_id(value) is None},
        "other_terms": other_terms,
        "is_free": header.license == "apache-2.0",
        "crop": read_record(folder / "preprocessor_config.json")["size"]["height"],
        **_input_facts(config),
    }
    return f"{config['model_type']}.md", header, facts


def _input_facts(config: dict[str, Any]) -> dict[str, Any]:
    """Return the bands that a network takes, and their number."""
    encoder = config.get("backbone_config") or config
    return {"input_bands": config.get("input_bands"), "n_channels": encoder.get("num_channels", 3)}


def _describe_ensemble(folder: Path, recipe: dict[str, Any]) -> tuple[str, ModelCardData, dict[str, Any]]:
    """Return template, header and facts of an ensemble."""
    _require_settings(folder, recipe, "column", "split")
    members = without_paths(read_record(folder / "ensemble.json"))["members"]
    for member in members:
        member["network"] = _network_name(read_record(folder / member["folder"] / "config.json"))
    data = read_training_data(folder)["target"]
    results, columns = read_record(folder / "eval_results.json"), []
    if results:
        scores = zip(members, results["members"], strict=True)
        columns = [_Column(member["folder"], {**results, **own}, data) for member, own in scores]
        columns.append(_Column("ensemble", results, data))
    image_kind = "SAR" if recipe["column"] == "sar" else "optical"
    header = _header(
        f"Ensemble of {len(members)} for {image_kind} land cover",
        columns[-1:],
        [recipe["column"], "ensemble"],
        library_name="hf_seg",
        split=recipe["split"],
        license="other",
        license_name="terms-of-the-members",
    )
    facts = {"members": members, "image_kind": image_kind, "data": data, "datasets": [data], "columns": columns}
    facts |= _input_facts(read_record(folder / members[0]["folder"] / "config.json"))
    return "ensemble.md", header, facts


def _header(title: str, columns: list[_Column], tags: list[str], *, split: str = "val", **more: Any) -> ModelCardData:
    """Return the card's metadata, by which the Hub shows the metrics."""
    results = [
        EvalResult(
            task_type="image-segmentation",
            dataset_type=_dataset_type(column.data),
            dataset_name=column.data["name"],
            dataset_split=split,
            dataset_revision=column.data["revision"],
            metric_type=metric_type,
            metric_name=metric_name,
            metric_value=column.scores[key],
        )
        for column in columns
        for key, metric_type, metric_name in (
            ("mean_iou", "mean_iou", "mean IoU"),
            ("overall_accuracy", "accuracy", "overall accuracy"),
        )
    ]
    return ModelCardData(
        model_name=title,
        pipeline_tag="image-segmentation",
        tags=["remote-sensing", "land-cover", *tags],
        metrics=["mean_iou", "accuracy"],
        eval_results=results or None,
        **more,
    )


def _dataset_type(data: Provenance) -> str:
    """Return the header's name of a dataset: its Hub id, the release's own, others by what they are."""
    if data["hub_id"] is not None:
        return str(data["hub_id"])
    layout = data["layout"].lower()
    if data["released"]:
        return layout
    return f"synthetic-{layout}" if data["synthetic"] else f"like-{layout}"


def _hub_datasets(names: Sequence[str | None], datasets: Sequence[Provenance]) -> list[str] | None:
    """Return the Hub ids that the header links to: of labels and of images; None if there are none."""
    found = [*names, *(data["hub_id"] for data in datasets)]
    return list(dict.fromkeys(name for name in found if name)) or None


def _license(datasets: Sequence[Provenance], other_terms: Sequence[str]) -> dict[str, Any]:
    """Return the header's licence: Apache-2.0 where all that was learned from is, else the terms of the data."""
    is_free = all(data["synthetic"] and data["license"] == "Apache-2.0" for data in datasets)
    if is_free and not other_terms:
        return {"license": "apache-2.0"}
    return {"license": "other", "license_name": "terms-of-the-training-data"}


def _hub_id(name: str) -> str | None:
    """Return the id of something on the Hub, None of a local folder or a preset."""
    identifier = name.partition("@")[0]
    return None if Path(name).exists() or identifier.count("/") != 1 else identifier


def _network_name(config: dict[str, Any]) -> str:
    names = {"segformer": "SegFormer", "upernet": "UperNet", "convnextv2": "ConvNeXtV2", "swinv2": "SwinV2"}
    types = (config["model_type"], (config.get("backbone_config") or {}).get("model_type"))
    timm_name = (config.get("backbone_config") or {}).get("backbone")
    return " ".join(names.get(kind, timm_name or kind) for kind in types if kind)


def read_header(card: str, path: Path) -> dict[str, Any]:
    """Return the metadata of a card, empty if it has none; `UserError` naming the file if they cannot be read."""
    try:
        return dict(RepoCard(card, ignore_metadata_errors=True).data.to_dict())
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: its header cannot be read ({one_line(error)})") from None


def without_tags_in(facts: Any) -> Any:
    """Return facts of a card with `without_tags` applied to every text in lists and mappings."""
    if isinstance(facts, dict):
        return {without_tags(key): without_tags_in(value) for key, value in facts.items()}
    if isinstance(facts, list | tuple):
        return [without_tags_in(each) for each in facts]
    return without_tags(facts)


def write_pseudo_label_card(folder: Path, summary: dict[str, Any]) -> None:
    """Write the README.md of a dataset of pseudo-labels, by whose header stock `load_dataset` finds the shards.

    Args:
        folder: of the dataset, with `training_data.json` where it exists.
        summary: what `manifest.json` says of models, settings and pixels.
    """
    data = read_training_data(folder)["target"]
    split = summary["settings"]["split"]
    models = without_paths(summary["models"])
    from_hub = [model["name"] for model in models if model["revision"] is not None]
    # datasets names its cache by the header alone: without the digest, new labels in an old place would not be read
    config: dict[str, Any] = {"config_name": "default", "description": f"labels {summary['labels_sha256']}"}
    config["data_files"] = [{"split": split, "path": f"data/{split}-*.parquet"}]
    header = DatasetCardData(
        pretty_name=f"Land-cover pseudo-labels of {data['name']}",
        task_categories=["image-segmentation"],
        tags=["remote-sensing", "land-cover", "pseudo-labels"],
        configs=[config],
        source_datasets=_hub_datasets([], [data]),
        **_license([data], from_hub),
    )
    ids = {name: index for index, name in enumerate(summary["class_histogram"], start=1)}
    facts: dict[str, Any] = {"ids": ids, "ignore_index": IGNORE_INDEX, "confidence_step": CONFIDENCE_STEP}
    facts["pretty_name"] = header.pretty_name
    facts |= {**summary, "models": models, "data": data, "from_hub": from_hub}
    template = packaged_folder("model_cards") / "pseudo_labels.md"
    card = DatasetCard.from_template(header, template_path=str(template), **without_tags_in(facts))
    write_atomic(folder / "README.md", card.content)
