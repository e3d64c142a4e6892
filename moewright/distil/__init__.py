"""Distillation: a sparse model learns from a dense one."""
