"""A sparse model written for a runtime, and the proof that the runtime computes the same."""
