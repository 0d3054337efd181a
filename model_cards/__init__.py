"""Templates of cards; an installed package has them as `hf_seg.model_cards`."""
