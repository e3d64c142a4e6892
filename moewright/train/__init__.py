"""Training: config, schedule, optim, metrics, start, resume, loop."""
