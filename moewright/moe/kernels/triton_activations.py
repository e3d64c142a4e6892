"""The activations of `moewright.moe.activations` for Triton kernels, each with its slope."""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def _sigmoid_times(x, inner, slope):
    """`x * sigmoid(inner)`, where `slope` is that of `inner`."""
    share = tl.sigmoid(inner)
    return x * share, share + x * share * (1 - share) * slope


@triton.jit
def _gelu(x):
    below = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
    return x * below, below + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)


@triton.jit
def _clamped(x, low: tl.constexpr, high: tl.constexpr):
    """Between `low` and `high`; NaN stays NaN, which `tl.minimum` would lose."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def activate(x, NAME: tl.constexpr):
    """Value and slope at `x`, both float32; of a gated activation, the factor that depends on the gate half.

    At a kink the slope is the one that torch takes.
    """
    if NAME == "silu":
        value, slope = _sigmoid_times(x, x, 1.0)
    elif NAME == "quick_gelu":
        value, slope = _sigmoid_times(x, 1.702 * x, 1.702)
    elif NAME == "swiglu_oai":
        gate = tl.where(x > 7.0, 7.0, x)
        value, slope = _sigmoid_times(gate, 1.702 * gate, 1.702)
        slope = tl.where(x > 7.0, 0.0, slope)
    elif NAME == "gelu_tanh":
        # (1 + tanh(u)) / 2 = sigmoid(2u); the constant is twice the root of 2 / pi.
        inner = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        value, slope = _sigmoid_times(x, inner, 1.5957691216057308 * (1 + 0.134145 * x * x))
    elif NAME == "gelu":
        value, slope = _gelu(x)
    elif NAME == "gelu_10":
        value, slope = _gelu(x)
        slope = tl.where(value > 10.0, 0.0, slope)
        value = _clamped(value, -10.0, 10.0)
    elif NAME == "relu":
        value = tl.where(x < 0, 0.0, x)
        slope = tl.where(x > 0, 1.0, 0.0)
    elif NAME == "relu2":
        rectified = tl.where(x < 0, 0.0, x)
        value = rectified * rectified
        slope = 2 * rectified
    elif NAME == "relu6":
        value = _clamped(x, 0.0, 6.0)
        slope = tl.where((x > 0) & (x < 6), 1.0, 0.0)
    elif NAME == "leaky_relu":
        slope = tl.where(x > 0, 1.0, 0.01)
        value = x * slope
    elif NAME == "hardswish":
        value = x * _clamped(x + 3, 0.0, 6.0) / 6
        slope = tl.where(x <= -3, 0.0, tl.where(x < 3, x / 3 + 0.5, 1.0))
    elif NAME == "laplace":
        inner = (x - 0.707107) / 0.39894257487763823
        value = 0.5 + 0.5 * tl.erf(inner)
        slope = tl.exp(-inner * inner) * 1.4142125184828966
    elif NAME == "mish":
        # tanh(log(1 + e^x)) = n / (n + 2) with n = e^x (e^x + 2); from 20 on it is 1.
        power = tl.exp(tl.minimum(x, 20.0))
        n = power * (power + 2)
        value = x * (n / (n + 2))
        slope = n / (n + 2) + x * (4 * power * (power + 1) / ((n + 2) * (n + 2)))
    elif NAME == "sigmoid":
        value = tl.sigmoid(x)
        slope = value * (1 - value)
    elif NAME == "tanh":
        value = 2 * tl.sigmoid(2 * x) - 1
        slope = 1 - value * value
    else:
        tl.static_assert(NAME == "linear")
        value = x
        slope = tl.full(x.shape, 1.0, tl.float32)
    return value, slope


@triton.jit
def up_factor(x, NAME: tl.constexpr):
    """Value and slope of the factor that depends on the up half: `x` itself, but for activations of both halves."""
    if NAME == "swiglu_oai":
        value = _clamped(x, -7.0, 7.0) + 1
        slope = tl.where((x < -7.0) | (x > 7.0), 0.0, 1.0)
    else:
        value = x
        slope = 1.0
    return value, slope
