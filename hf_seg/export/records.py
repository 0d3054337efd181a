"""What a run's records say of its networks: the kind of image they learned, and from which data."""

from pathlib import Path

from hf_seg.hub.export import TRAINING_DATA_FILE, read_record


def input_bands(folder: Path) -> int | None:
    """Return 1 for a network or an ensemble of 8-bit SAR, whose band is replicated; None: as many as it takes."""
    recipe = read_record(folder / "recipe.yaml")
    configs = [folder / "config.json", *folder.glob("member_*/config.json")]
    if not recipe or any(read_record(config).get("input_bands") for config in configs):
        return None
    column = recipe.get("column", "optical" if "method" in recipe else "sar")  # a stage 2 has neither
    return 1 if column == "sar" else None


def training_data_name(folder: Path) -> str | None:
    """Return the name of the data that a model was trained on, if it was recorded."""
    data = read_record(folder / TRAINING_DATA_FILE)
    return " and ".join(dict.fromkeys(str(each["name"]) for each in data.values() if "name" in each)) or None
