"""What `scripts/benchmark.py` runs: each module compares ours with what a user would otherwise use."""
