"""The dense families of transformers: where their feed-forward blocks are, and what their tensors count."""
