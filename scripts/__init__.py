"""Tools around the pipeline; an installed package has them as `hf_seg.scripts`."""
