"""The model on several ranks: config, ranks, mesh, exchange, experts, shard, parts, gradients, apply."""
