"""Training: config, run_file, objective, start, resume, metrics, result, loop."""
