"""Training: config, schedule, optim, metrics, console, start, resume, loop."""
