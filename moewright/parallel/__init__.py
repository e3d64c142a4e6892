"""The model on several ranks: config, ranks, mesh, tensor, exchange, experts, shard, parts, gradients, apply."""
