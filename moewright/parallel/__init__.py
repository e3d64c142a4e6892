"""The model on several ranks, and what of it lies where: mesh, experts, shard, memory, offload, recompute, apply."""
