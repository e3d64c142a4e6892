"""Formats: one file for each family of architectures, with names of tensors and config fields said once."""
