"""The optimiser, where its tensors lie and in which precision, and the learning rate of each step."""
