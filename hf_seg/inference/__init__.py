"""From a network to the map of a whole scene."""
