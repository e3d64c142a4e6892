"""The mixture-of-experts layer: plain tensors in, plain tensors out.

Read its files in this order, in which each imports only from those before it: config; precision, activations, router;
capacity; balance, stats, context; exchange, dispatch, experts, kernels; layer, step.
"""
