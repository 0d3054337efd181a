"""All-weather land-cover mapping from SAR, learned from noisy pseudo-labels."""

__version__ = "0.1.0"
