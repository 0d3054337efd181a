"""The files beside a map, each made from the finished map: legend, style, preview, polygons and catalog item."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from hf_seg.errors import UserError, file_errors
from hf_seg.labels import LabelSet
from hf_seg.mapping.legend import attribute_table, qgis_style, side_car, style_file
from hf_seg.mapping.options import RasterOptions
from hf_seg.mapping.polygons import write_polygons
from hf_seg.mapping.provenance import Acquisition
from hf_seg.mapping.scene import Scene
from hf_seg.mapping.stac import MapFile, item_of


class FinishedMap(NamedTuple):
    """A map whose files are written, but not yet in their places.

    Args:
        files: by what they are, the class ids first.
        pixels: by class id.
        tags: of the files.
        acquisition: of the scene; None without a catalog item.
    """

    scene: Scene
    files: dict[str, MapFile]
    label_set: LabelSet
    pixels: Sequence[int]
    tags: dict[str, str]
    acquisition: Acquisition | None

    @property
    def class_map(self) -> Path:
        """The GeoTIFF of class ids."""
        return next(iter(self.files.values())).current


class SideFile(NamedTuple):
    """One file beside a map: what it is, its place, and a function that writes it."""

    key: str
    path: Path
    write: Callable[[FinishedMap, Path], object]


def choose_side_files(class_map: Path, options: RasterOptions) -> list[SideFile]:
    """Return the files to write beside the map at `class_map`, in order; the catalog item names those before it."""
    style = style_file(class_map)
    files = [
        SideFile("attribute_table", side_car(class_map), _write_attribute_table),
        SideFile("style", style, _write_style),
    ]
    if options.preview:
        files.append(SideFile("preview", class_map.with_name(f"{class_map.stem}_preview.png"), _draw_preview))
    if options.polygons is not None:
        path = options.polygon_path(class_map)
        files.append(SideFile("polygons", path, _write_polygons))
        if path.suffix != ".gpkg" and style_file(path) != style:  # a GeoPackage contains its style
            files.append(SideFile("polygon_style", style_file(path), _write_style))
    if options.stac:
        item = class_map.with_suffix(".stac.json")
        files.append(SideFile("item", item, lambda finished, output: _write_item(finished, item, output)))
    return files


def check_targets(targets: Sequence[Path], source: Path, label_set: LabelSet, *, overwrite: bool, bands: Path) -> None:
    """Refuse to write over the scene, a folder or, without `overwrite`, an existing file.

    Args:
        targets: the files to write, the class map first.
        source: the scene.
        bands: folder of finished bands; if it exists, an interrupted run may have put all files but the class map in
            their places.

    Raises:
        UserError: naming the first target that cannot be written.
    """
    class_map = targets[0]
    if class_map.suffix.lower() not in (".tif", ".tiff"):
        raise UserError(f"the map is a GeoTIFF: its name must end in .tif, not {class_map.name!r}")
    for target in targets:
        with file_errors(target, "cannot be written"):
            if target.is_dir():
                raise UserError(f"{target} is a folder; name the file to write")
            if source.exists() and target.exists() and source.samefile(target):
                raise UserError(f"{target} is the scene itself; name another file for the map")
            if overwrite or not target.exists() or (target != class_map and bands.exists()):
                continue
            if not _is_left_over(target, class_map, label_set):
                raise UserError(f"{target} already exists; add --overwrite (overwrite=True), or name another file")


def _is_left_over(path: Path, class_map: Path, label_set: LabelSet) -> bool:
    """Tell whether an existing file is what a deleted map of this name left, and of no use to anything else."""
    if path.suffix == ".qml":
        return path.read_bytes() == qgis_style(label_set)
    return path == side_car(class_map)


def _write_attribute_table(finished: FinishedMap, output: Path) -> None:
    output.write_bytes(attribute_table(finished.label_set, finished.pixels))


def _write_style(finished: FinishedMap, output: Path) -> None:
    output.write_bytes(qgis_style(finished.label_set))


def _draw_preview(finished: FinishedMap, output: Path) -> None:
    from hf_seg.mapping.figure import plot_map  # matplotlib is slow to import

    title = Path(finished.scene.name).name
    plot_map(finished.class_map, finished.scene, output, title=title, label_set=finished.label_set)


def _write_polygons(finished: FinishedMap, output: Path) -> None:
    write_polygons(finished.class_map, output, finished.label_set)


def _write_item(finished: FinishedMap, item: Path, output: Path) -> None:
    assert finished.acquisition is not None
    content = item_of(
        item,
        finished.files,
        label_set=finished.label_set,
        pixels=finished.pixels,
        tags=finished.tags,
        acquisition=finished.acquisition,
    )
    output.write_bytes(content)
