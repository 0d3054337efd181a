"""The options of a map. Import-light, so that the command line answers `--help` before its slow imports."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from hf_seg.arguments import Tta
from hf_seg.errors import UserError, shown
from hf_seg.mapping.provenance import parse_times
from hf_seg.settings import check_bounds, setting

Units = Literal["linear", "power", "db"]
UNITS: tuple[str, ...] = get_args(Units)
LARGEST_WINDOW = 2**14  # pixels
POLYGON_SUFFIXES = (".gpkg", ".geojson", ".fgb")


@dataclass(frozen=True, kw_only=True)
class SceneOptions:
    """Reading the scene."""

    bands: list[int] | None = setting(
        None,
        "1-based band numbers: one (SAR), three (optical) or as many as the network takes; default: the only band, or "
        "red, green and blue, or all",
    )
    units: Units = setting("linear", "units of the values: amplitude (linear), power, or decibels (db)")
    stretch: list[float] | None = setting(
        None, "the two values that become 0 and 255; default: uint8 is not stretched, other types by percentiles"
    )
    zero_collar: bool = setting(
        True,
        "zeros connected with the scene's border are nodata if the scene declares none; --no_zero_collar keeps them",
    )


@dataclass(frozen=True, kw_only=True)
class PredictionOptions:
    """Prediction."""

    window: int | None = setting(None, "side of the window in pixels; default: the crop size of the training", low=1)
    stride: float = setting(0.5, "step of the sliding window as a fraction of the window", above=0, high=1)
    tta: Tta = setting("none", "test-time augmentation")
    batch_size: int = setting(4, "windows per forward pass", low=1)
    mixed_precision: Literal["no", "bf16", "fp16"] = setting("no", "arithmetic of the networks")
    abstain: float = setting(0.0, "pixels whose most probable class is below this become nodata", low=0, high=1)


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """Output files."""

    confidence: bool = setting(False, "also write the probability of the predicted class")
    disagreement: bool = setting(False, "also write the weight of the ensemble's networks that predict another class")
    probabilities: bool = setting(False, "also write the probability of every class")
    cog: bool = setting(False, "write cloud-optimized GeoTIFF")
    preview: bool = setting(False, "also draw the scene, the map and a legend: MAP_preview.png")
    polygons: str | None = setting(
        None,
        "also write the map as polygons: a file name, or a suffix (.gpkg, .geojson, .fgb) to name it after the map",
    )
    stac: bool = setting(False, "also describe the map as an item of a STAC catalog: MAP.stac.json")
    datetime: str | None = setting(
        None, "when the scene was acquired, for the STAC item: ISO 8601, or begin/end; default: from the scene's tags"
    )
    overwrite: bool = setting(False, "replace an existing map")


@dataclass(frozen=True, kw_only=True)
class RasterOptions(OutputOptions, PredictionOptions, SceneOptions):
    """How to read a scene, how to predict, and what to write.

    Raises:
        UserError: a value out of its bounds, or polygons or a STAC item that cannot be written.
    """

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.window is not None and self.window > LARGEST_WINDOW:
            raise UserError(f"window must be at most {LARGEST_WINDOW}; it is {shown(self.window)}")
        if self.polygons is not None:
            self._check_polygons()
        if self.datetime is not None:
            parse_times(self.datetime)
            if not self.stac:
                raise UserError("datetime is a property of the STAC item; add --stac (stac=True)")
        if self.stac and importlib.util.find_spec("pystac") is None:
            raise UserError("a STAC item needs pystac: pip install 'hf_seg[stac]'")

    def _check_polygons(self) -> None:
        path = self.polygon_path(Path("map.tif"))
        if path.suffix not in POLYGON_SUFFIXES:
            wanted = f"polygons are written to a file that ends in {', '.join(POLYGON_SUFFIXES)}"
            raise UserError(f"{wanted}; not to {shown(str(path))}")
        missing = [name for name in ("pyogrio", "shapely") if importlib.util.find_spec(name) is None]
        if missing:
            raise UserError(f"polygons need {' and '.join(missing)}: pip install 'hf_seg[vector]'")

    def polygon_path(self, destination: Path) -> Path:
        """Return the polygon file of the map at `destination`."""
        assert self.polygons is not None
        return destination.with_suffix(self.polygons) if self.polygons in POLYGON_SUFFIXES else Path(self.polygons)
