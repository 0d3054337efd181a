"""Where a map comes from: the model that made it, and when its scene was acquired. Import-light."""

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hf_seg import __version__
from hf_seg.errors import UserError, shown

if TYPE_CHECKING:
    from hf_seg.inference.load import LoadedNetwork

# Tags of a scene that tell when it was acquired, or when the acquisition began and ended. The first are GDAL's own, in
# its domain IMAGERY; the others come from its readers of Sentinel-1, Sentinel-2 and netCDF.
BEGIN_TAGS = (
    "ACQUISITIONDATETIME",
    "ACQUISITION_START_TIME",
    "ACQUISITION_DATETIME",
    "ACQUISITION_DATE",
    "DATATAKE_1_DATATAKE_SENSING_START",
    "PRODUCT_START_TIME",
    "time_coverage_start",
)
END_TAGS = {
    "ACQUISITION_START_TIME": "ACQUISITION_STOP_TIME",
    "PRODUCT_START_TIME": "PRODUCT_STOP_TIME",
    "time_coverage_start": "time_coverage_end",
}
FILE_TAG = "TIFFTAG_DATETIME"  # when an image was created, which some producers set to the acquisition
FILE_TIME = "modification time of the scene's file"


class Acquisition(NamedTuple):
    """When a scene was acquired, in UTC; the two times differ if it took a while. `source` tells how that is known."""

    begin: datetime.datetime
    end: datetime.datetime
    source: str


def model_tags(networks: Sequence["LoadedNetwork"]) -> dict[str, str]:
    """Describe the software and the networks of a map, those of a folder or the Hub by name, revision and checksum."""
    tags = {"TIFFTAG_SOFTWARE": f"hf_seg {__version__}"}
    found: dict[str, list[str | None]] = {
        "model": [*dict.fromkeys(network.model for network in networks)],
        "model_revision": [*dict.fromkeys(network.model_revision for network in networks)],
        "model_sha256": [network.sha256 for network in networks],
    }
    return tags | {key: " ".join(map(str, values)) for key, values in found.items() if all(values)}


def parse_times(text: str) -> tuple[datetime.datetime, datetime.datetime]:
    """Parse a time in ISO 8601, or begin and end of an interval with a slash between them; UTC unless it says else.

    Raises:
        UserError: another format, or an end before the begin.
    """
    try:
        begin, _, end = text.partition("/")
        times = parse_time(begin), parse_time(end or begin)
    except ValueError:
        raise UserError(
            f"datetime is {shown(text)}; expected ISO 8601, e.g. 2025-04-01T10:30:00Z, or begin/end of an interval"
        ) from None
    if times[1] < times[0]:
        raise UserError(f"datetime is {shown(text)}; its end is before its begin")
    return times


def parse_time(text: str) -> datetime.datetime:
    """Parse ISO 8601 or TIFF's `YYYY:MM:DD HH:MM:SS`; any other text, and a year before 1, is a `ValueError`."""
    text = text.strip()
    date, separator, time = text.partition(" ")
    if date.count(":") == 2 and separator:
        text = f"{date.replace(':', '-')} {time}"
    parsed = datetime.datetime.fromisoformat(text)
    try:
        return parsed.astimezone(datetime.UTC) if parsed.tzinfo else parsed.replace(tzinfo=datetime.UTC)
    except OverflowError:
        raise ValueError(f"{text} is out of range") from None


def find_acquisition(scene: Any, name: str, given: str | None) -> Acquisition:
    """Find out when a scene was acquired: as given, by its tags, or the time of its file if nothing else is known.

    All of these are the same for a map that is interrupted and resumed; the present time is not.

    Args:
        scene: an open raster.
        name: of its file.
        given: see `parse_times`.

    Raises:
        UserError: none of these is known.
    """
    if given is not None:
        return Acquisition(*parse_times(given), "given")
    tags = {**scene.tags(), **scene.tags(ns="IMAGERY")}
    for tag in (*BEGIN_TAGS, FILE_TAG):
        begin = _read_time(tags, tag)
        if begin is not None:
            end = _read_time(tags, END_TAGS.get(tag, tag))
            return Acquisition(begin, end if end and end > begin else begin, tag)
    if not Path(name).is_file():
        raise UserError(f"{name} does not tell when it was acquired, which a STAC item must; pass --datetime")
    modified = datetime.datetime.fromtimestamp(int(Path(name).stat().st_mtime), datetime.UTC)
    return Acquisition(modified, modified, FILE_TIME)


def _read_time(tags: Mapping[str, str], name: str) -> datetime.datetime | None:
    try:
        return parse_time(tags[name])
    except (KeyError, ValueError):
        return None
