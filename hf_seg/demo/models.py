"""The models that the page offers."""

import threading
from collections.abc import Sequence
from pathlib import Path

from hf_seg.errors import UserError
from hf_seg.inference.load import LoadedNetwork
from hf_seg.mapping.raster import find_networks


class Models:
    """Models by the names their owner gave, each loaded once and kept.

    Args:
        names: folders or Hub ids; all are loaded here, so that a mistake shows before the page does.
        allow_any: `load` takes any other name too. Whoever sees the page can then make this computer open its folders
            and load models from the Hub.

    Raises:
        UserError: no name, or a model that cannot be loaded.
    """

    def __init__(self, names: Sequence[str], *, allow_any: bool = False) -> None:
        if not names:
            raise UserError("the page needs one model or more: --model FOLDER_OR_HUB_ID")
        self.names, self.allow_any = list(dict.fromkeys(names)), allow_any
        self._lock = threading.Lock()
        self._listed = {name: find_networks(name) for name in self.names}
        self._last: tuple[str, list[LoadedNetwork]] | None = None  # of the others, one is kept

    def labels(self) -> list[tuple[str, str]]:
        """Return what to show for each name, and the name: of a long path the last two parts, if they tell it apart."""
        short = [name if not Path(name).is_dir() else "/".join(Path(name).parts[-2:]) for name in self.names]
        return [*zip(short if len({*short}) == len(short) else self.names, self.names, strict=True)]

    def load(self, name: str) -> list[LoadedNetwork]:
        """Return the networks of a model.

        Raises:
            UserError: a name that is not offered, or a model that cannot be loaded.
        """
        if name in self._listed:
            return self._listed[name]
        if not self.allow_any:
            raise UserError(f"this page does not offer the model {name!r}; choose one of {', '.join(self.names)}")
        with self._lock:
            if self._last is None or self._last[0] != name:
                self._last = (name, find_networks(name))
            return self._last[1]
