"""The optimiser, and the learning rate of each step."""
