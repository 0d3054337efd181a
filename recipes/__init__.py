"""The four stages of the pipeline; an installed package has them as `hf_seg.recipes`."""
