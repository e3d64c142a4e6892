"""What fits where, and how fast: units, devices, workload, simulate, shape, memory, flops, layouts, report."""
