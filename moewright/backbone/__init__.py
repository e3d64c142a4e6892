"""Where a transformers model keeps its feed-forward blocks, and how one is replaced."""
