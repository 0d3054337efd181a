"""Load networks and predict images of any size."""
