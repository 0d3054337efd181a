"""All-weather land-cover mapping from SAR, learned from noisy pseudo-labels."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["EnsembleForSemanticSegmentation", "predict_raster"]


def __getattr__(name: str) -> Any:  # so that `import hf_seg` needs no seconds of torch and transformers
    if name == "EnsembleForSemanticSegmentation":
        from hf_seg.ensemble import EnsembleForSemanticSegmentation

        return EnsembleForSemanticSegmentation
    if name == "predict_raster":
        from hf_seg.mapping.raster import predict_raster

        return predict_raster
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
