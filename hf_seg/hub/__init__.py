"""From a trained network to a folder that the Hub takes."""
