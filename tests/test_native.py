"""What is particular to the C++ kernel: dtypes with products of their own, and how rows are laid out for them."""

import sys

import pytest
import torch

from moewright.moe.dispatch import sort_by_expert
from moewright.moe.kernels import KERNELS
from moewright.moe.kernels.base import ExpertWeights

native = KERNELS["native"]


@pytest.fixture(params=[torch.bfloat16, torch.float16])
def short(request, monkeypatch):
    """A dtype that `native` multiplies as it is, whatever instructions this processor has."""
    monkeypatch.setattr(sys.modules[native.__module__], "_has_products_of", lambda dtype: True)
    return request.param


def test_it_rounds_as_torch_casts(short):
    # Products with the identity are exact, and so is a sum of one: what is rounded is the activation and its gradient.
    width, count = 32, 4096
    torch.manual_seed(0)
    x, upstream = (torch.randn(count, width).to(short) for _ in range(2))
    x[0, 0] = float("nan")
    weights = (torch.arange(count)[:, None] % 8 + 1) / 2  # of few bits: many products are ties
    weights[count // 2 :] = torch.rand(count // 2, 1)
    identity = torch.eye(width)[None].to(short)
    permutation = sort_by_expert(torch.zeros(count, 1, dtype=torch.int64), num_experts=1)
    y = native(x.requires_grad_(), weights, permutation, ExpertWeights(identity, identity, None, None, "linear", False))
    (d_x,) = torch.autograd.grad(y, x, upstream)
    products = [tensor.detach().float() * weights for tensor in (x, upstream)]
    assert y[0].isnan().all()
    assert torch.equal(y[1:], products[0][1:].to(short))
    assert torch.equal(d_x, products[1].to(short))
    if short == torch.bfloat16:
        assert (products[0].view(torch.int32) & 0xFFFF == 0x8000).sum() > 1000, "a case that tells nothing"
