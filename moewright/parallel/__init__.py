"""The model on several ranks: config, ranks, mesh, experts, shard, memory, offload, recompute, parts, gradients, apply."""
