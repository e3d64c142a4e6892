"""The mixture-of-experts layer: plain tensors in, plain tensors out.

Read it in this order: config, router, balance, dispatch, experts (and kernels), stats, layer.
"""
