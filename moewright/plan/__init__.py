"""What fits where, and how fast: units, devices, sizes, thin, simulate, ledger, memory, flops, layouts, report."""
