"""Finished bands of a map on disk, so that a killed run can resume and several processes can share one scene.

The folder contains `map.json`, which identifies the map, and one compressed file per band of rows. Every file is
written atomically.
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from hf_seg.errors import UserError
from hf_seg.files import remove, write_atomic


class BandStore:
    """The finished bands of a map of `count` bands, in a folder of their own."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count

    def open(self, identity: Mapping[str, object]) -> bool:
        """Create the folder, or keep it if it belongs to the same map; tell whether another map's bands were deleted.

        Args:
            identity: everything that the bands depend on, serialisable as JSON.
        """
        wanted = json.dumps(identity, indent=1, sort_keys=True).encode()
        file = self.folder / "map.json"
        is_other = self.folder.exists() and not (file.is_file() and file.read_bytes() == wanted)
        if is_other:
            remove(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(file, wanted)
        return is_other

    def missing(self) -> list[int]:
        """Return the numbers of the unfinished bands, ascending."""
        return [number for number in range(self.count) if not self._file(number).exists()]

    def save(self, number: int, band: np.ndarray) -> None:
        """Save a finished band, uint8 of any shape."""
        write_atomic(self._file(number), zlib.compress(band.tobytes(), level=1))

    def load(self, number: int, shape: tuple[int, ...]) -> np.ndarray:
        """Return a band that was saved with this shape; a damaged one is a `UserError`."""
        try:
            content = zlib.decompress(self._file(number).read_bytes())
            return np.frombuffer(content, np.uint8).reshape(shape)
        except (zlib.error, ValueError):
            self._file(number).unlink()
            raise UserError(f"{self._file(number)} was damaged and is deleted; run the same command again") from None

    def remove(self) -> None:
        """Delete the folder."""
        remove(self.folder)

    def _file(self, number: int) -> Path:
        return self.folder / f"rows_{number:05d}.z"
