"""The bands of images that are neither 8-bit SAR nor 8-bit RGB: their names, and how their values become uint8.

    bands = Bands(("VV", "VH"), low=(-22.0, -30.0), high=(3.0, -5.0))
    bands.to_uint8(raw, valid_pixels(raw))      # (2, H, W) uint8, 0 where there is no data

Training, evaluation and mapping stretch each band by the same two values, which a model keeps in its `config.json`
under `input_bands`. Behind the stretch images of any number type are what SAR and RGB images are: uint8, 0 is nodata.
The 254 steps between `low` and `high` are finer than the noise of radar and optical sensors alike.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import numpy as np

RED_GREEN_BLUE = ("red", "green", "blue")


class Bands(NamedTuple):
    """Names of bands, and the values that become 1 and 255."""

    names: tuple[str, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]

    @classmethod
    def from_config(cls, config: dict[str, Any] | None) -> Self | None:
        """Return what `as_config` wrote; None for a model of 8-bit SAR or RGB images.

        Raises:
            ValueError: it is incomplete or inconsistent.
        """
        if config is None:
            return None
        try:
            names = tuple(map(str, config["names"]))
            low, high = (tuple(map(float, config[key])) for key in ("low", "high"))
        except (KeyError, TypeError, ValueError):
            raise ValueError("input_bands must have names, low and high") from None
        in_order = len(low) == len(high) == len(names) > 0 and all(a < b for a, b in zip(low, high, strict=True))
        if not in_order:
            raise ValueError("input_bands must have as many low as high values, and low below high")
        return cls(names, low, high)

    def as_config(self) -> dict[str, Any]:
        """Return plain lists for a `config.json`."""
        return {key: list(values) for key, values in self._asdict().items()}

    def to_uint8(self, raw: np.ndarray, valid: np.ndarray) -> np.ndarray:
        """Stretch each band to 1..255; values beyond are cut off.

        Args:
            raw: (bands, H, W) of any number type.
            valid: (H, W) bool.

        Returns:
            (bands, H, W) uint8, 0 where not valid.
        """
        low, high = (np.array(values, np.float64)[:, None, None] for values in (self.low, self.high))
        values = np.where(valid, raw, 0).astype(np.float64)  # what is not valid may be NaN
        levels = 1 + (values - low) * (254 / (high - low))
        return np.where(valid, np.rint(np.clip(levels, 1, 255)), 0).astype(np.uint8)


def valid_pixels(raw: np.ndarray, masks: np.ndarray | None = None) -> np.ndarray:
    """Return (H, W) bool, True where there is data.

    Of floats one band without data is enough to exclude a pixel. An integer pixel has no data if all its bands have
    none, since 0 also occurs in colours.

    Args:
        raw: (bands, H, W).
        masks: (bands, H, W) bool, False where a band has its declared nodata value.
    """
    if np.issubdtype(raw.dtype, np.floating):
        with_data = np.isfinite(raw) if masks is None else masks & np.isfinite(raw)
        return np.asarray(with_data.all(axis=0))
    return np.asarray((raw != 0 if masks is None else masks).any(axis=0))


def rgb_indices(names: Sequence[str]) -> list[int]:
    """Return the positions of red, green and blue among band names; [] if one is not there."""
    lower = [name.lower() for name in names]
    return [lower.index(color) for color in RED_GREEN_BLUE] if {*RED_GREEN_BLUE} <= {*lower} else []
