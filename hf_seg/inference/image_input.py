"""A file, a PIL image or an array, as the uint8 array that `to_pixel_values` takes."""

from pathlib import Path

import numpy as np
from PIL import Image

from hf_seg.errors import UserError

ImageInput = Image.Image | np.ndarray | str | Path


def read_image(image: ImageInput, *, name: str = "image", n_bands: int = 3) -> np.ndarray:
    """Read one image; grey stays grey, and other colours and palettes become RGB.

    Args:
        image: a file that PIL opens, a PIL image, or (H, W) or (H, W, bands) uint8.
        name: what an error calls it; a file has its own name.
        n_bands: of an image that is not grey.

    Returns:
        (H, W) or (H, W, bands) uint8.

    Raises:
        UserError: no such file, or not 8 bits per band, naming the image.
    """
    if isinstance(image, str | Path):
        name = str(image)
        try:
            image = Image.open(image)
            image.load()
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(f"{name} cannot be read as a picture ({error}); scenes are for predict_raster") from None
    if isinstance(image, Image.Image):
        is_wide = image.mode.startswith(("I", "F"))  # PIL would cut its values off at 255
        image = np.array(image if is_wide or image.mode == "L" else image.convert("RGB"))
    if image.dtype != np.uint8 or image.shape[2:] not in ((), (n_bands,)) or not image.size:
        raise UserError(
            f"{name}: expected (H, W) or (H, W, {n_bands}) uint8, got {image.shape} {image.dtype}; bring it to 0..255 "
            "as the training images were"
        )
    return image
