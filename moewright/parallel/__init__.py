"""The model on several ranks, and what of it lies where: mesh, tensor, experts, shard, offload, recompute, apply."""
