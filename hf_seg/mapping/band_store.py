"""Finished rows of a map on disk, so that a killed run goes on and several processes work on one scene.

The folder holds `map.json`, which says what is being made, and one compressed file per band of rows. A file appears
whole or not at all.
"""

import json
import os
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from hf_seg.errors import UserError


class BandStore:
    """The bands of one map in progress.

    Args:
        folder: of the store, and of nothing else.
        count: number of bands.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self.folder = folder
        self.count = count

    def open(self, identity: Mapping[str, object]) -> bool:
        """Make the folder, or keep it where it was made for the same map; bands of another map are dropped.

        Args:
            identity: JSON-able; all that the bands depend on.

        Returns:
            Whether bands of another map were dropped.
        """
        wanted = json.dumps(dict(identity), indent=1, sort_keys=True)
        file = self.folder / "map.json"
        dropped = self.folder.exists() and not (file.is_file() and file.read_text(encoding="utf-8") == wanted)
        if dropped:
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        _write_whole(file, wanted.encode())
        return dropped

    def missing(self) -> list[int]:
        """Return the numbers of the bands that are still to be made, ascending."""
        return [number for number in range(self.count) if not self._file(number).exists()]

    def save(self, number: int, band: np.ndarray) -> None:
        """Keep a band, any shape of uint8."""
        _write_whole(self._file(number), zlib.compress(band.tobytes(), level=1))

    def load(self, number: int, shape: tuple[int, ...]) -> np.ndarray:
        """Return a band that was saved with this shape.

        Raises:
            UserError: it is damaged.
        """
        try:
            content = zlib.decompress(self._file(number).read_bytes())
            return np.frombuffer(content, np.uint8).reshape(shape)
        except (zlib.error, ValueError):
            self._file(number).unlink()
            raise UserError(f"{self._file(number)} was damaged and is deleted; run the same command again") from None

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder)

    def _file(self, number: int) -> Path:
        return self.folder / f"rows_{number:05d}.z"


def _write_whole(path: Path, content: bytes) -> None:
    """Write aside, make sure that it has reached the disk, rename."""
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    with aside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
