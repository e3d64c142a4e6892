"""The layer against its definition in float64, and the properties that every option keeps."""

import ast
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from moewright import moe
from moewright.errors import UsageError
from moewright.moe import kernels
from moewright.moe.activations import ACTIVATIONS, GATED_ACTIVATIONS
from moewright.moe.balance import attach_loss, count_tokens, switch_loss, z_loss
from moewright.moe.config import ROUTER_ORDERS, MoEConfig
from moewright.moe.dispatch import combine, dispatch
from moewright.moe.exchange import sort_by_expert
from moewright.moe.experts import ExpertWeights
from moewright.moe.kernels import KERNELS, build, default_kernel
from moewright.moe.kernels.memory import empty
from moewright.moe.layer import MoELayer
from tests import reference

D, F, E, K, T = 16, 8, 6, 3, 20


def layer_of(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: object) -> MoELayer:
    torch.manual_seed(seed)
    settings = {"hidden_size": D, "expert_size": F, "num_experts": E, "top_k": K} | changes
    layer = MoELayer(MoEConfig(**settings), dtype=dtype)
    with torch.no_grad():
        layer.router.weight.normal_()
    return layer


def tokens(count: int = T, seed: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def doubles(layer: MoELayer) -> list[torch.Tensor]:
    """Router, first and second weights in float64, as leaves."""
    return [p.detach().double().requires_grad_() for p in layer.parameters()]


def expected(layer: MoELayer, x: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
    config = layer.config
    return reference.moe(
        x,
        *weights,
        top_k=config.top_k,
        order=config.router_order,
        activation=config.activation,
        gated=config.gated,
    )


def relative(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((actual.double() - wanted).norm() / wanted.norm().clamp(min=1e-12)).item()


def test_files_are_read_in_the_order_that_the_package_names():
    folder = Path(moe.__file__).parent
    order = re.findall(r"[a-z]+", moe.__doc__.partition("before it: ")[2])
    assert sorted(order) == sorted(p.stem for p in folder.iterdir() if p.suffix == ".py" or p.name == "kernels")[1:]
    for name in order:
        for path in (folder / name).glob("*.py") if name == "kernels" else [folder / f"{name}.py"]:
            lines = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
            imported = {line.module.split(".")[2] for line in lines if line.module.startswith("moewright.moe.")}
            assert imported - {name} <= set(order[: order.index(name)]), path


HERE = ("grouped", "loop", "native")
"""The kernels that run on any machine with a C++ compiler; the others have test files of their own."""


@pytest.mark.parametrize("kernel", HERE)
@pytest.mark.parametrize("order", ROUTER_ORDERS)
@pytest.mark.parametrize(("gated", "activation"), [(True, "silu"), (True, "gelu_pytorch_tanh"), (False, "relu2")])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_layer_and_gradients_equal_the_definition(kernel, order, gated, activation, dtype, tolerance):
    layer = layer_of(kernel=kernel, router_order=order, gated=gated, activation=activation, dtype=dtype)
    x = tokens(dtype=dtype)
    upstream = torch.randn(T, D, generator=torch.Generator().manual_seed(2))

    output = layer(x)
    output.backward(upstream.to(dtype))

    weights, x64 = doubles(layer), x.detach().double().requires_grad_()
    wanted = expected(layer, x64, weights)
    wanted.backward(upstream.to(dtype).double())

    assert relative(output, wanted) < tolerance
    assert relative(x.grad, x64.grad) < tolerance
    for parameter, reference_weight in zip(layer.parameters(), weights, strict=True):
        assert relative(parameter.grad, reference_weight.grad) < tolerance


@pytest.mark.parametrize("order", ROUTER_ORDERS)
@pytest.mark.parametrize("padded", [False, True])
def test_attached_losses_equal_the_definition(order, padded):
    layer = layer_of(router_order=order, balance_loss=0.7, z_loss=0.3)
    x = tokens()
    mask = torch.arange(T) % 3 != 0 if padded else torch.ones(T, dtype=torch.bool)
    layer.context.token_mask = mask if padded else None
    layer.context.loss_scale = torch.tensor(0.25)

    (layer(x) * 0.0).sum().backward()

    router, x64 = layer.router.weight.detach().double().requires_grad_(), x.detach().double().requires_grad_()
    balance = reference.balance(x64[mask], router, K, order)
    z = reference.z(x64[mask], router)
    (0.25 * (0.7 * balance + 0.3 * z)).backward()
    assert layer.stats.balance_loss.item() == pytest.approx(balance.item(), rel=1e-5)
    assert layer.stats.z_loss.item() == pytest.approx(z.item(), rel=1e-5)
    assert relative(layer.router.weight.grad, router.grad) < 1e-5
    assert relative(x.grad, x64.grad) < 1e-5
    assert layer.stats.tokens_per_expert.sum().item() == mask.sum().item() * K


def test_switch_loss_by_hand():
    # Two tokens, both to expert 0 of 2 with probability 3/4: f = (1, 0), P = (3/4, 1/4), loss = 2 * 3/4.
    probabilities = torch.tensor([[0.75, 0.25], [0.75, 0.25]])
    counts = count_tokens(torch.tensor([[0], [0]]), num_experts=2, mask_T=None)
    assert switch_loss(probabilities, counts).item() == pytest.approx(1.5)
    even = torch.full((4, 2), 0.5)
    counts = count_tokens(torch.tensor([[0, 1]] * 4), num_experts=2, mask_T=None)
    assert switch_loss(even, counts).item() == pytest.approx(1.0)


def test_z_loss_by_hand():
    assert z_loss(torch.zeros(3, 4)).item() == pytest.approx(torch.tensor(4.0).log().item() ** 2)


def test_attach_loss_leaves_the_output_and_adds_the_gradient():
    output = torch.ones(3, requires_grad=True)
    parameter = torch.tensor(2.0, requires_grad=True)
    attached = attach_loss(output * 1.0, parameter**2)
    assert torch.equal(attached, output)
    attached.sum().backward()
    assert parameter.grad.item() == 4.0
    assert torch.equal(output.grad, torch.ones(3))


def test_no_loss_is_attached_in_evaluation():
    layer = layer_of(balance_loss=1.0, z_loss=1.0).eval()
    (layer(tokens()) * 0.0).sum().backward()
    assert layer.router.weight.grad.abs().max() == 0


@pytest.mark.parametrize("kernel", HERE)
@pytest.mark.parametrize("count", [0, 1])
def test_no_token_and_one_token(kernel, count):
    layer = layer_of(kernel=kernel, balance_loss=0.1, z_loss=0.1)
    x = tokens(count)
    output = layer(x)
    output.backward(torch.ones_like(output))
    assert output.shape == (count, D)
    for value in (output, x.grad, *(p.grad for p in layer.parameters()), layer.stats.entropy):
        assert torch.isfinite(value).all()
    assert layer.stats.tokens_per_expert.sum() == count * K


@pytest.mark.parametrize("kernel", HERE)
def test_all_tokens_to_one_expert_leave_the_others_without_gradient(kernel):
    layer = layer_of(kernel=kernel, top_k=1, router_order="softmax-topk")
    with torch.no_grad():
        layer.router.weight.zero_()[2] = 1.0
    layer(tokens().abs()).sum().backward()
    assert layer.stats.tokens_per_expert.tolist() == [0, 0, T, 0, 0, 0]
    dead = [e for e in range(E) if e != 2]
    assert layer.experts.down_proj.grad[dead].abs().max() == 0
    assert layer.experts.down_proj.grad[2].abs().max() > 0


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_dispatch_keeps_every_assignment_once(data):
    experts = data.draw(st.integers(1, 9), label="experts")
    top_k = data.draw(st.integers(1, experts), label="top_k")
    chosen = data.draw(st.lists(st.permutations(range(experts)), max_size=12), label="chosen")
    experts_TK = torch.tensor([row[:top_k] for row in chosen], dtype=torch.int64).view(-1, top_k)
    count = experts_TK.shape[0]
    permutation = sort_by_expert(experts_TK, num_experts=experts)

    assert sorted(permutation.order_N.tolist()) == list(range(count * top_k))
    flat = experts_TK.flatten()[permutation.order_N].tolist()
    assert flat == sorted(flat)
    assert permutation.ends_E.tolist() == [sum(e <= limit for e in flat) for limit in range(experts)]
    assert torch.equal(permutation.order_N[permutation.position_TK.flatten()], torch.arange(count * top_k))

    x = torch.arange(count, dtype=torch.float64)[:, None].repeat(1, 2)
    copies = dispatch(x, permutation)
    assert copies[:, 0].tolist() == (permutation.order_N // top_k).tolist()
    weights = torch.full((count, top_k), 1.0 / top_k, dtype=torch.float64)
    torch.testing.assert_close(combine(copies, weights, permutation), x)
    mask = torch.arange(count) % 2 == 0
    counts = count_tokens(experts_TK, num_experts=experts, mask_T=mask)
    assert counts.tolist() == torch.bincount(experts_TK[mask].flatten(), minlength=experts).tolist()


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations_are_those_of_transformers(name):
    from transformers.activations import ACT2FN

    x = torch.linspace(-4, 4, 101)
    torch.testing.assert_close(ACTIVATIONS[name](x), ACT2FN[name](x), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("kernel", HERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_clamps_of_gpt_oss_are_those_of_the_definition(kernel, dtype):
    # So far out that a good part of both halves is clamped, at either end of the up half.
    layer = layer_of(kernel=kernel, activation="swiglu_oai", expert_bias=True, dtype=dtype)
    with torch.no_grad():
        layer.experts.gate_up_proj.mul_(20)
    x = tokens(dtype=dtype)
    upstream = torch.randn(T, D, generator=torch.Generator().manual_seed(2)).to(dtype)
    output = layer(x)
    output.backward(upstream)

    weights = {name: p.detach().double().requires_grad_() for name, p in layer.named_parameters()}
    x64 = x.detach().double().requires_grad_()
    hidden = torch.einsum("td,ehd->teh", x64, weights["experts.gate_up_proj"])
    for clamped in (hidden[..., :F] > 7, hidden[..., F:] > 7, hidden[..., F:] < -7):
        assert 0.05 < clamped.double().mean() < 0.9, "a case that tells nothing"
    wanted = reference.layer(x64, weights, layer.config, training=True).output_TD
    wanted.backward(upstream.double())
    tolerance = 5e-6 if dtype == torch.float32 else 3e-2
    assert relative(output, wanted) < tolerance
    assert relative(x.grad, x64.grad) < tolerance
    for name, parameter in layer.named_parameters():
        assert relative(parameter.grad, weights[name].grad) < tolerance, name


def test_statistics_count_a_token_once_under_recomputation():
    layer = layer_of(balance_loss=0.1)
    x = tokens()
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert layer.stats.tokens_per_expert.sum() == T * K
    recomputed = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    layer(tokens()).sum().backward()
    for parameter, gradient in zip(layer.parameters(), recomputed, strict=True):
        assert torch.equal(parameter.grad, gradient)


@pytest.mark.parametrize("kernel", HERE)
def test_equal_runs_give_equal_bits(kernel):
    gradients = []
    for _ in range(2):
        layer = layer_of(kernel=kernel)
        layer(tokens(500)).square().sum().backward()
        gradients.append([p.grad for p in layer.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# torch 2.13's own tracer instantiates autograd functions, and its own check warns of it.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", ["auto", "grouped", "native"])
def test_dropless_layer_compiles_whole(kernel, dtype):
    layer = layer_of(dtype=dtype, balance_loss=0.1, kernel=kernel)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, y = tokens(dtype=dtype), tokens(dtype=dtype)
    compiled(x).sum().backward()
    gradients = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    layer(y).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    for parameter, gradient in zip(layer.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_layer_runs_on_the_meta_device():
    layer = MoELayer(MoEConfig(hidden_size=D, expert_size=F, num_experts=E, top_k=K), device="meta")
    assert layer(torch.empty(2, 5, D, device="meta")).shape == (2, 5, D)


@pytest.mark.parametrize("kernel", HERE)
def test_autocast_gives_float32_gradients_and_bfloat16_products(kernel):
    layer = layer_of(kernel=kernel)
    x = tokens()
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    output.sum().backward()
    exact = layer(tokens())
    assert layer.router.weight.grad.dtype == layer.experts.down_proj.grad.dtype == torch.float32
    assert 1e-5 < relative(output, exact.double()) < 2e-2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"top_k": 7}, "top_k=7 > num_experts=6"),
        ({"top_k": 0}, "top_k=0"),
        ({"expert_size": 0}, "expert_size=0"),
        ({"router_order": "softmax"}, "topk-softmax"),
        ({"balance_loss": -1.0}, "balance_loss=-1.0"),
        ({"z_loss": float("nan")}, "z_loss=nan"),
    ],
)
def test_senseless_configs_are_refused(changes, words):
    with pytest.raises(UsageError, match=words):
        layer_of(**changes)


def test_unknown_names_are_refused():
    with pytest.raises(UsageError, match="choose one of grouped, loop, native"):
        layer_of(kernel="magic")(tokens())
    with pytest.raises(UsageError, match="relu2"):
        layer_of(activation="magic")


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 5), min_size=1, max_size=6),
    rest=st.integers(0, 3),
    sizes=st.tuples(st.integers(1, 19), st.integers(1, 19)),
    bias=st.booleans(),
    gated=st.booleans(),
)
@pytest.mark.parametrize("kernel", ["grouped", "native"])
def test_kernels_agree_at_every_width(kernel, counts, rest, sizes, bias, gated):
    # Widths that torch's own product refuses are among them, and assignments of no expert.
    torch.manual_seed(0)
    (D, F), E, N = sizes, len(counts), sum(counts) + rest
    H = 2 * F if gated else F
    chosen = torch.repeat_interleave(torch.arange(E), torch.tensor(counts))
    experts = torch.cat([chosen, torch.zeros(rest, dtype=torch.int64)])[:, None]
    kept = (torch.arange(N) < len(chosen))[:, None]
    permutation = sort_by_expert(experts, num_experts=E, kept_TK=kept if rest else None)
    shapes = [(N, D), (N, 1), (E, H, D), (E, D, F), *([(E, H), (E, D)] if bias else [])]
    leaves, upstream = [torch.randn(shape) for shape in shapes], torch.randn(1).expand(N, D)  # of stride 0
    results = []
    for name in ("loop", kernel):
        x, weights, *parameters = tensors = [leaf.clone().requires_grad_() for leaf in leaves]
        stacked = ExpertWeights(*parameters, *([] if bias else [None, None]), "silu", gated)
        y = KERNELS[name](x, weights, permutation, stacked)
        results.append([y, *torch.autograd.grad(y, tensors, upstream)])
    for loop, other in zip(*results, strict=True):
        # Where large terms cancel, what is left has the rounding of the terms.
        largest = loop.abs().max().item() if loop.numel() else 0.0
        torch.testing.assert_close(other, loop, rtol=1e-4, atol=1e-5 * max(1.0, largest))


def test_grouped_kernel_names_the_dtype_it_lacks():
    with pytest.raises(UsageError, match="float64: use kernel 'loop'"):
        layer_of(kernel="grouped", dtype=torch.float64)(tokens(dtype=torch.float64))


def test_outputs_can_be_changed_in_place():
    layer = layer_of(balance_loss=0.1)
    output = layer(tokens())
    output += 1.0
    output.sum().backward()


BOTH = [(name, gated) for gated in (True, False) for name in sorted(ACTIVATIONS)]


@pytest.mark.parametrize(("name", "gated"), [*BOTH, *((name, True) for name in GATED_ACTIVATIONS)])
def test_native_activations_are_those_of_torch(name, gated):
    # Written again in C++, with derivatives of their own: compared far out, too.
    results = []
    for kernel in ("loop", "native"):
        layer = layer_of(kernel=kernel, activation=name, gated=gated)
        x = (tokens().detach() * torch.logspace(-3, 2, T)[:, None]).requires_grad_()
        output = layer(x)
        results.append([output, *torch.autograd.grad(output.square().sum(), [x, *layer.experts.parameters()])])
    for loop, native in zip(*results, strict=True):
        torch.testing.assert_close(native, loop, rtol=2e-5, atol=2e-5 * loop.abs().max().item())


def test_native_kernel_in_blocks_of_rows():
    # More rows for one expert than are taken at once, and few experts on many threads.
    results = []
    for kernel in ("loop", "native"):
        layer = layer_of(kernel=kernel, num_experts=2, top_k=1, router_order="softmax-topk", expert_bias=True)
        x = tokens(5000)
        layer(x).square().sum().backward()
        results.append([x.grad, *(parameter.grad for parameter in layer.parameters())])
    for loop, native in zip(*results, strict=True):
        torch.testing.assert_close(native, loop, rtol=1e-3, atol=1e-4 * loop.abs().max().item())


def test_native_kernel_in_inference_mode_and_after_it():
    layer = layer_of(kernel="native")
    wanted = layer(tokens()).detach()
    with torch.inference_mode():
        assert torch.equal(layer(tokens()), wanted)
    layer(tokens()).sum().backward()
    assert layer.experts.down_proj.grad.isfinite().all()


def test_buffers_are_used_again_only_when_nobody_refers_to_them():
    first = empty(512, 1024, dtype=torch.float32).fill_(1)
    assert not first._is_view(), "FSDP2 warns of modules that return one"
    view, address = first[3:], first.data_ptr()
    del first
    second = empty(512, 1024, dtype=torch.float32).fill_(2)
    assert second.data_ptr() != address
    assert (view == 1).all()
    del view
    assert empty(512, 1024, dtype=torch.float32).data_ptr() == address


def test_auto_is_native_on_a_cpu_and_grouped_where_it_cannot_be_compiled(tmp_path, monkeypatch, caplog):
    assert default_kernel(torch.device("cpu")) == "native"
    monkeypatch.setenv("MOEWRIGHT_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "/no/such/compiler")
    uncached = build.problem.__wrapped__
    monkeypatch.setattr(build, "problem", uncached)
    monkeypatch.setattr(kernels, "_native_problem", kernels._native_problem.__wrapped__)
    assert default_kernel(torch.device("cpu")) == "grouped"
    assert "cannot be compiled" in caplog.text
    assert "/no/such/compiler" in caplog.text
    with pytest.raises(UsageError, match="use kernel 'grouped'"):
        layer_of(kernel="native")(tokens())


@pytest.mark.parametrize("kernel", HERE)
@pytest.mark.parametrize("name", sorted(ACTIVATIONS | GATED_ACTIVATIONS))
def test_what_is_not_a_number_stays_so(name, kernel):
    # The training loop stops at a loss that is not finite: no kernel may swallow it.
    layer = layer_of(kernel=kernel, activation=name, router_order="softmax-topk")
    with torch.no_grad():
        layer.experts.gate_up_proj[:, F // 2] = float("nan")
    assert layer(tokens()).isnan().all()
    with torch.no_grad():
        layer.experts.gate_up_proj[:, F // 2] = 1.0
        layer.experts.gate_up_proj[:, F] = float("nan")  # a row of the up half
    assert layer(tokens()).isnan().all()


def test_padding_that_is_not_finite_harms_nobody():
    layer = layer_of(balance_loss=0.1, z_loss=0.1)
    x = tokens().detach()
    x[::3] = float("nan")
    layer.context.token_mask = torch.arange(T) % 3 != 0
    layer(x)[layer.context.token_mask].sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())
    assert layer.stats.balance_loss.isfinite()
    assert layer.stats.entropy.isfinite()


@pytest.mark.parametrize("mask", [torch.ones(T), torch.ones(T + 1).bool(), torch.ones(2, T // 2).bool()])
def test_a_mask_of_another_form_is_refused(mask):
    layer = layer_of()
    layer.context.token_mask = mask
    with pytest.raises(UsageError, match=f"for {T} tokens: it must be bool"):
        layer(tokens())


def test_casts_and_the_meta_device_keep_what_moves_outside_the_gradient():
    changes = {"capacity_factor": 1.0, "balance_loss": 0.25, "balance_adaptation": 0.2, "selection_bias": True}
    layer = layer_of(**changes)
    layer.router.bias += 1e-4
    layer.balance_coefficient += 1e-6
    layer.bfloat16()
    assert layer.router.weight.dtype == torch.bfloat16
    assert layer.router.bias.tolist() == pytest.approx([1e-4] * E)
    assert layer.balance_coefficient.item() == pytest.approx(0.250001)
    empty_layer = MoELayer(layer.config, device="meta").to_empty(device="cpu")
    assert empty_layer.balance_coefficient.item() == 0.25
    assert empty_layer.previous_counts.tolist() == [0] * E
    assert empty_layer.stats.step_counts.tolist() == [0] * (E + 1)


def test_native_kernel_computes_only_gradients_that_are_asked_for():
    layer, whole = layer_of(kernel="native", expert_bias=True), layer_of(kernel="native", expert_bias=True)
    whole(tokens()).square().sum().backward()
    layer.experts.requires_grad_(False)
    layer.experts.down_proj_bias.requires_grad_(True)
    layer(tokens()).square().sum().backward()
    assert layer.experts.gate_up_proj.grad is layer.experts.down_proj.grad is None
    assert torch.equal(layer.experts.down_proj_bias.grad, whole.experts.down_proj_bias.grad)
    assert torch.equal(layer.router.weight.grad, whole.router.weight.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_operators_keep_the_rules_of_torch(dtype):
    x = torch.randn(D, 5).to(dtype).t().requires_grad_()  # not contiguous
    first, down = (torch.randn(shape).to(dtype).requires_grad_() for shape in ((2, 2 * F, D), (2, D, F)))
    sorted_ = sort_by_expert(torch.tensor([[0], [1], [1], [0], [1]]), num_experts=2)
    routes = (torch.rand(5, requires_grad=True), sorted_.token_N, sorted_.order_N, sorted_.ends_E)
    arguments = (x, *routes, first, down, None, None, "silu", True, True)
    torch.library.opcheck(
        torch.ops.moewright.experts_forward.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


def test_native_kernel_wants_one_dtype():
    layer = layer_of(kernel="native")
    with pytest.raises(UsageError, match="bfloat16 and experts of"):
        layer(tokens(dtype=torch.bfloat16))


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_forked_process_has_buffers_of_its_own():
    tensor = empty(512, 1024, dtype=torch.float32).fill_(1)
    child = os.fork()
    if not child:
        tensor[0, 0] = 2  # no more: OpenMP's threads do not come along
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert (tensor == 1).all()


def test_buffers_can_be_taken_and_given_back_by_many_threads():
    def work(number):
        for size in range(1, 60):
            tensor = empty(size % 7 + 1, 1 << 18, dtype=torch.float32)
            tensor.view(-1)[::4096] = number
            assert (tensor.view(-1)[::4096] == number).all()

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
