"""What a sparse model learns from a dense one."""
