"""Self-training across domains: the arithmetic of stage 1."""
