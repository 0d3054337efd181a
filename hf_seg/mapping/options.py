"""What can be chosen when a scene is mapped, and which targets are refused."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hf_seg.errors import UserError
from hf_seg.mapping.polygons import DRIVERS, check_polygon_target
from hf_seg.settings import setting


@dataclass(frozen=True, kw_only=True)
class RasterOptions:
    """How to read a scene, how to look at it, and what to write."""

    bands: list[int] | None = setting(
        None, "1-based bands: one (SAR) or three (optical); default: the only one, or RGB"
    )
    units: Literal["linear", "power", "db"] = setting(
        "linear", "what the values are: linear (as they are), power, or db"
    )
    stretch: list[float] | None = setting(None, "two values that become 0 and 255; default: uint8 as it is, else found")
    zero_collar: bool = setting(True, "zeros connected with the border are nodata, where the scene declares none")
    stride: float = setting(0.5, "step of the window as a share of it")
    batch_size: int = setting(4, "windows per forward pass")
    confidence: bool = setting(False, "also write the probability of the class chosen")
    disagreement: bool = setting(False, "also write the share of an ensemble's networks for another class")
    probabilities: bool = setting(False, "also write the probability of every class")
    abstain: float = setting(0.0, "pixels whose class has a probability below this become nodata")
    cog: bool = setting(False, "write cloud-optimised GeoTIFF")
    preview: bool = setting(False, "also draw scene, map and legend, as MAP_preview.png")
    polygons: str | None = setting(
        None, "also write the map as polygons: a file, or just .gpkg, .geojson or .fgb for MAP.gpkg ..."
    )
    overwrite: bool = setting(False, "replace a map that is already there")

    def __post_init__(self) -> None:
        for name, holds, what in (
            ("stride", 0 < self.stride <= 1, "above 0 and at most 1"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("abstain", 0 <= self.abstain <= 1, "in 0..1"),
        ):
            if not holds:
                raise UserError(f"{name} must be {what}; it is {getattr(self, name)!r}")
        if self.polygons is not None:
            check_polygon_target(self.polygon_path(Path("map.tif")))

    def polygon_path(self, destination: Path) -> Path:
        """Return where the polygons of a map go."""
        assert self.polygons is not None
        return destination.with_suffix(self.polygons) if self.polygons in DRIVERS else Path(self.polygons)


def check_targets(source: Path, targets: list[Path], *, overwrite: bool) -> None:
    """Refuse to write over the scene, a folder or, unless told to, an earlier map."""
    for target in targets:
        if target.is_dir():
            raise UserError(f"{target} is a folder; name the file to write")
        if source.exists() and target.exists() and source.samefile(target):
            raise UserError(f"{target} is the scene itself; name another file for the map")
        if target.exists() and not overwrite:
            raise UserError(f"{target} is already there; add --overwrite (overwrite=True), or name another file")
