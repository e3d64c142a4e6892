"""Training: config, run_file, objective, start, generators, resume, saving, metrics, result, loop."""
