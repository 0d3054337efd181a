"""Networks as one file that needs no hf_seg: ONNX or torch.export, checked, with STAC and QGIS metadata."""
