"""Export a trained network or an ensemble as one file that runs without hf_seg.

    python scripts/export_model.py --model runs/stage2_b5 --format onnx --output exported/b5
    python scripts/export_model.py --model runs/ensemble --format onnx --output exported/qgis --fixed_size --bands 1
    hf-seg predict scene.tif map.tif --model exported/b5/model.onnx

The file maps raw pixels (B, bands, H, W), float32 in the units of the data, to class probabilities (B, K, H, W):
stretch, normalisation, resizing, softmax and the weighted mean of an ensemble are inside. It is run at several sizes
and compared with PyTorch before it is written; a difference above 1e-4 is an error. Beside it goes a STAC Item (Machine
Learning Model extension). An ONNX file also tells the QGIS plug-in Deepness what it needs; the plug-in takes 8-bit
images and a fixed size only (--fixed_size).
"""

import argparse
from pathlib import Path

from hf_seg.errors import one_line_errors
from hf_seg.settings import Parser
from hf_seg.terminal import print_summary


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder or Hub id of a trained network or ensemble")
    parser.add_argument("--format", required=True, choices=("onnx", "pt2"), help="onnx, or pt2 of torch.export")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="folder to write")
    parser.add_argument("--opset", type=int, help="version of ONNX's operators; default: the exporter's")
    parser.add_argument("--image", type=Path, help="tile for the check; default: a generated one")
    parser.add_argument(
        "--bands",
        type=int,
        help="bands of the input: as many as the networks take, or 1 that is replicated for them (SAR); default: those "
        "of --image, 1 for a run that learned SAR, else as many as the networks take",
    )
    parser.add_argument("--crop_size", type=int, help="side of the windows, for an ensemble of different ones")
    parser.add_argument("--fixed_size", action="store_true", help="fix height and width to the crop, as QGIS needs")
    parser.add_argument("--resolution_cm", type=float, help="centimetres per pixel of the data, for QGIS")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    return parser.parse_args()


def main() -> None:
    """Load, export, say what was written."""
    args = parse()

    from transformers.utils.logging import disable_progress_bar  # slow imports come after the command line

    from hf_seg.export.formats import require_packages
    from hf_seg.export.records import input_bands, training_data_name
    from hf_seg.export.write import ExportOptions, check_target, export_networks
    from hf_seg.inference.load import load_networks

    disable_progress_bar()
    options = ExportOptions(
        format=args.format,
        opset=args.opset,
        bands=args.bands or (input_bands(Path(args.model)) if args.image is None else None),
        crop_size=args.crop_size,
        fixed_size=args.fixed_size,
        image=args.image,
        resolution_cm=args.resolution_cm,
        trained_on=training_data_name(Path(args.model)),
        overwrite=args.overwrite,
    )
    require_packages(options.format)
    check_target(args.output, overwrite=args.overwrite)
    networks = load_networks(args.model)
    written = export_networks(networks, args.output, options)
    for shape, difference in written.differences.items():
        print(f"agrees with PyTorch at {shape}: largest difference of a probability {difference:.1e}")
    metadata, crop = written.metadata, written.metadata.crop_size
    size = f"{crop} x {crop}"
    if metadata.size_multiple:
        size = (
            f"any size, windows of {size}" if metadata.size_multiple == 1 else f"multiples of {metadata.size_multiple}"
        )
    print(f"input: {metadata.bands} bands, {size} pixels, any batch; output: {len(metadata.classes)} classes")
    if args.format == "onnx" and metadata.size_multiple:
        print("note: the QGIS plug-in Deepness takes a fixed size only; for it, export with --fixed_size")
    if args.format == "onnx" and args.resolution_cm is None:
        print("note: the resolution is not known; tell QGIS with --resolution_cm")
    print_summary(
        f"{written.size / 1e6:.1f} MB",
        {"bands": metadata.bands, "classes": metadata.classes, "bytes": written.size},
        [written.file, args.output / "stac.json"],
    )


if __name__ == "__main__":
    with one_line_errors():
        main()
