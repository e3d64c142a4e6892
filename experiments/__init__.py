"""Scripts that measure, with seeds: each writes a JSON file to `results/` and renews its part of a page of `docs/`."""
