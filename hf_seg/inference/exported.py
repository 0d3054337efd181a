"""Networks exported to ONNX, run by onnxruntime instead of PyTorch; `hf_seg.export` writes them.

network = open_exported(Path("runs/exported/model.onnx"))
network(pixels).logits      # (B, bands, H, W) raw pixels -> (B, K, H, W) logarithms of the class probabilities
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from hf_seg.bands import Bands
from hf_seg.errors import UserError, file_errors
from hf_seg.files import sha256_of
from hf_seg.label_sets import label_set_of
from hf_seg.labels import LabelSet

MODEL_FILES = {"onnx": "model.onnx", "pt2": "model.pt2"}  # in the folder of an export, by format
METADATA_KEY = "hf_seg"  # of the JSON in the file's own metadata
FORMAT = 1  # version of that JSON; increase it whenever an older reader would misunderstand a newer file
INPUT, OUTPUT = "pixels", "probabilities"
_LEAST = torch.finfo(torch.float32).tiny  # a probability that has underflowed keeps a finite logarithm


@dataclass(frozen=True, kw_only=True)
class ExportMetadata:
    """What the user of an exported graph must know of it; stored in its file as JSON.

    The graph maps raw pixels, (B, bands, H, W) float32 in the units of the data, to class probabilities, (B, K, H, W).

    Args:
        name, revision: of the model, or its commit on the Hub; a name that may be published.
        classes: id, name and color ("#rrggbb") of each class, by id.
        background: id of the class that is never predicted: its probability is 0, and those of the others add up to
            one minus what the networks gave it.
        bands: number of the input's bands.
        input_bands: names of bands that are not 8-bit SAR or RGB, and their stretch, see `hf_seg.bands`. The graph
            stretches them itself, and takes NaN for no data.
        crop_size: side in pixels of the windows to predict with.
        size_multiple: height and width may be any multiple of this; None: both must be `crop_size`.
        members: name, revision, weight, architecture and normalisation of each network.
        versions: of the libraries, by name.
        opset: of ONNX; None for another format.
    """

    name: str
    revision: str | None
    classes: list[dict[str, Any]]
    background: int
    bands: int
    input_bands: dict[str, Any] | None
    crop_size: int
    size_multiple: int | None
    members: list[dict[str, Any]]
    versions: dict[str, str]
    opset: int | None = None

    @property
    def label_set(self) -> LabelSet:
        """The classes."""
        names = {each["id"]: each["name"] for each in self.classes}
        colors = [each["color"] for each in self.classes]
        return label_set_of({"id2label": names, "label_colors": colors}, self.name)

    @property
    def stretch(self) -> Bands | None:
        """Bands of the input and their stretch; None: 8-bit SAR or RGB."""
        return Bands.from_config(self.input_bands)

    def to_json(self) -> str:
        """Return the text that `from_json` reads."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)})

    @classmethod
    def from_json(cls, text: str, name: str) -> Self:
        """Read the metadata of the file `name`; `UserError` if it is damaged or of another version."""
        try:
            values = json.loads(text)
            if values.pop("format") != FORMAT:
                raise UserError(f"{name} was exported by another version of hf_seg; export the model again")
            metadata = cls(**values)
            _ = metadata.label_set, metadata.stretch, int(metadata.bands), int(metadata.crop_size)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{name} has damaged metadata ({error!r}); export the model again") from None
        return metadata

    def accepts(self, height: int, width: int) -> bool:
        """Tell whether the graph computes images of this size."""
        if self.size_multiple is None:
            return height == width == self.crop_size
        return height % self.size_multiple == width % self.size_multiple == 0


class ExportedLogits(NamedTuple):
    """What an exported network returns."""

    logits: Tensor  # (B, K, H, W) float32


class OnnxNetwork(nn.Module):
    """An exported network as a module without weights; it computes on the CPU, in float32.

    Args:
        session: of onnxruntime.
        metadata: of the file.
        path: names the file in errors.
        sha256: digest of the file, in hexadecimal; part of `repr`, by which a map knows what it was made with.
    """

    def __init__(self, session: Any, metadata: ExportMetadata, *, path: Path, sha256: str) -> None:
        super().__init__()
        self.metadata, self.path, self.sha256 = metadata, path, sha256
        self._session = session

    def forward(self, pixels: Tensor) -> ExportedLogits:
        """Map pixels to the logarithms of class probabilities, that of background restored.

        Args:
            pixels: (B, bands, H, W), stretched to 0..255 where the graph takes other values.

        Raises:
            UserError: a size that the graph does not compute.
        """
        height, width = pixels.shape[-2:]
        if not self.metadata.accepts(height, width):
            multiple, crop = self.metadata.size_multiple, self.metadata.crop_size
            sizes = f"multiples of {multiple} pixels" if multiple else f"{crop} x {crop} pixels only"
            raise UserError(f"{self.path} takes windows of {sizes}, not {height} x {width}; choose another --window")
        values = unstretch(pixels.float().cpu(), self.metadata.stretch).contiguous()
        (found,) = self._session.run([OUTPUT], {INPUT: values.numpy()})
        probs = torch.from_numpy(found)
        probs[:, self.metadata.background] = (1 - probs.sum(dim=1)).clamp_min(0)
        return ExportedLogits(probs.clamp_min(_LEAST).log().to(pixels.device))

    def extra_repr(self) -> str:
        """Identify the network by the digest of its file."""
        return f"sha256={self.sha256}"


def unstretch(levels: Tensor, bands: Bands | None) -> Tensor:
    """Return raw values, (B, bands, H, W) float32, whose stretch gives these levels again; NaN where all are 0."""
    if bands is None:
        return levels
    low, high = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in bands[1:])
    raw = low + (levels.double() - 1) * ((high - low) / 254)
    return torch.where((levels == 0).all(dim=-3, keepdim=True), torch.nan, raw).float()


def find_exported(name: str) -> Path | None:
    """Return the ONNX file that a name stands for, a file or the folder of an export; None: it is something else.

    Raises:
        UserError: an export of another format.
    """
    path = Path(name)
    if path.suffix == ".onnx" and not path.is_dir():
        return path
    is_export = path.is_dir() and not any((path / file).exists() for file in ("config.json", "ensemble.json"))
    if is_export and (path / MODEL_FILES["onnx"]).is_file():
        return path / MODEL_FILES["onnx"]
    if path.suffix == ".pt2" or (is_export and (path / MODEL_FILES["pt2"]).is_file()):
        raise UserError(
            f"{name} is for torch.export.load, which unpickles; export the model with --format onnx to use it here"
        )
    return None


def open_exported(path: Path) -> OnnxNetwork:
    """Open an ONNX file that `hf_seg.export` wrote.

    Raises:
        UserError: it does not exist, is damaged, or is of another project; or onnxruntime is not installed.
    """
    with file_errors(path, "cannot be read"):
        path.open("rb").close()
    session = open_session(path)
    metadata = session.get_modelmeta().custom_metadata_map
    if METADATA_KEY not in metadata:
        raise UserError(
            f"{path} was not exported by hf_seg: it does not say what it takes; see scripts/export_model.py"
        )
    files = sorted(path.parent.glob(f"{path.name}*"))  # with the weights of a large model, model.onnx.data
    digest = hashlib.sha256("".join(map(sha256_of, files)).encode()).hexdigest()
    return OnnxNetwork(session, ExportMetadata.from_json(metadata[METADATA_KEY], str(path)), path=path, sha256=digest)


def open_session(path: Path) -> Any:
    """Open an ONNX file with onnxruntime, on the CPU, with as many threads as torch has.

    Raises:
        UserError: it is damaged, or onnxruntime is not installed.
    """
    try:
        import onnxruntime
    except ImportError:
        raise UserError(f"{path} needs onnxruntime: pip install 'hf_seg[onnx]'") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises many kinds; each is about this file
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} cannot be opened as an ONNX model; export it again ({reason})") from None
