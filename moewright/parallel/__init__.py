"""The model on several ranks: config, ranks, mesh, experts, shard, parts, gradients, apply."""
