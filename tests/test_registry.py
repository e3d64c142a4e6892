"""transformers' own mixture-of-experts models with our product in place of theirs."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedModel, Qwen2MoeConfig, Qwen3MoeConfig
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation

import moewright.auto  # noqa: F401 - registers the name "moewright"
from moewright.backbone import experts_registry
from moewright.errors import UsageError
from moewright.moe.activations import ACTIVATIONS

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "mixtral": MixtralConfig(num_local_experts=4, num_experts_per_tok=2, **SMALL),
    "qwen2_moe": Qwen2MoeConfig(
        num_experts=6, num_experts_per_tok=3, moe_intermediate_size=20, shared_expert_intermediate_size=16, **SMALL
    ),
    "qwen3_moe": Qwen3MoeConfig(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=12, head_dim=8, **SMALL),
}


def random_model(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family], experts_implementation="eager")
    with torch.no_grad():  # the initialisation leaves the experts so small that their part would drown in rounding
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


def logits_and_gradients(model: PreTrainedModel) -> tuple[Tensor, list[Tensor | None]]:
    ids = torch.randint(0, 64, (2, 11), generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    logits = model(input_ids=ids).logits
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    (logits * weights).sum().backward()
    return logits.detach(), [None if p.grad is None else p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_logits_and_gradients_are_those_of_eager(family: str) -> None:
    model = random_model(family)
    logits, gradients = logits_and_gradients(model)
    model.set_experts_implementation("moewright")
    assert model.config._experts_implementation == "moewright"
    ours, our_gradients = logits_and_gradients(model)
    torch.testing.assert_close(ours, logits, rtol=1e-4, atol=1e-4)
    for gradient, our_gradient in zip(gradients, our_gradients, strict=True):
        if gradient is None:
            assert our_gradient is None
        else:
            scale = float(gradient.abs().max())
            torch.testing.assert_close(our_gradient, gradient, rtol=1e-4, atol=1e-4 * max(scale, 1e-3))


def test_a_folder_is_loaded_with_our_product_by_one_argument(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("mixtral")
    logits, _ = logits_and_gradients(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="moewright")
    used = []

    def counting(device: torch.device) -> str:
        used.append(device)
        return "loop"

    monkeypatch.setattr(experts_registry, "default_kernel", counting)
    ours, _ = logits_and_gradients(loaded)
    assert len(used) == 2
    torch.testing.assert_close(ours, logits, rtol=1e-4, atol=1e-4)


def test_a_model_is_compiled_whole() -> None:
    model = random_model("qwen3_moe").eval()
    model.set_experts_implementation("moewright")
    ids = torch.arange(12).view(1, 12)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(input_ids=ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)


def experts_of(**options: Any) -> nn.Module:
    """A module as `use_experts_implementation` makes them, with weights for 3 experts, widths 8 and 4."""

    class Experts(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            first = (3, 8, 8) if options.get("has_gate", True) else (3, 4, 8)
            shapes = {"gate_up_proj" if options.get("has_gate", True) else "up_proj": first, "down_proj": (3, 8, 4)}
            for name, shape in shapes.items():
                if options.get("is_transposed"):
                    shape = (shape[0], shape[2], shape[1])
                self.register_parameter(name, nn.Parameter(torch.randn(shape)))
                if options.get("has_bias"):
                    width = shape[2] if options.get("is_transposed") else shape[1]
                    self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(3, width)))
            self.act_fn = ACT2FN["gelu"]

        def forward(self, *args: Any) -> Tensor:
            raise NotImplementedError

    torch.manual_seed(0)
    config = MixtralConfig(**SMALL)
    config._experts_implementation = "moewright"
    return use_experts_implementation(Experts, **options)(config)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_every_layout_that_transformers_knows(gated: bool, transposed: bool, bias: bool) -> None:
    module = experts_of(has_gate=gated, is_transposed=transposed, has_bias=bias)
    x_TD, weights_TK = torch.randn(5, 8), torch.rand(5, 2)
    experts_TK = torch.tensor([[0, 1], [1, 2], [2, 0], [0, 3], [3, 1]])  # 3 is another rank's
    expected_TD = torch.zeros_like(x_TD)
    parameters = dict(module.named_parameters())
    first_name = "gate_up_proj" if gated else "up_proj"
    for t, k in ((t, k) for t in range(5) for k in range(2) if experts_TK[t, k] < 3):
        e = experts_TK[t, k]
        first, down = parameters[first_name][e], parameters["down_proj"][e]
        hidden = x_TD[t] @ (first if transposed else first.T)
        if bias:
            hidden = hidden + parameters[f"{first_name}_bias"][e]
        a = nn.functional.gelu(hidden[:4]) * hidden[4:] if gated else nn.functional.gelu(hidden)
        y = a @ (down if transposed else down.T)
        if bias:
            y = y + parameters["down_proj_bias"][e]
        expected_TD[t] += weights_TK[t, k] * y
    module._is_expert_parallel = True
    torch.testing.assert_close(module(x_TD, experts_TK, weights_TK), expected_TD, rtol=1e-5, atol=1e-5)


def test_experts_that_compute_more_are_refused() -> None:
    arguments = (torch.randn(2, 8), torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1))
    with pytest.raises(UsageError, match="interleaves") as refused:
        experts_of(is_concatenated=False)(*arguments)
    assert "\n" not in str(refused.value)
    module = experts_of()
    module.has_post_expert_norm = True  # an option of the decorator that transformers 5.16 does not have
    with pytest.raises(UsageError, match="normalises each expert's output"):
        module(*arguments)


def test_an_unknown_activation_and_a_gate_of_its_own_are_refused() -> None:
    arguments = (torch.randn(2, 8), torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1))
    module = experts_of()
    module.act_fn = nn.LeakyReLU(0.3)
    with pytest.raises(UsageError, match="has the activation LeakyReLU"):
        module(*arguments)
    module = experts_of()
    type(module)._apply_gate = lambda self, hidden: hidden
    with pytest.raises(UsageError, match="gates in a way of its own"):
        module(*arguments)


@pytest.mark.parametrize("name", sorted(set(ACTIVATIONS) & set(ACT2FN)))
def test_the_activation_of_a_block_is_recognised(name: str) -> None:
    module = experts_of()
    module.act_fn = ACT2FN[name]
    x_TD = 3 * torch.randn(5, 8)
    hidden_TH = x_TD @ module.gate_up_proj[1].T
    expected_TD = (module.act_fn(hidden_TH[:, :4]) * hidden_TH[:, 4:]) @ module.down_proj[1].T
    y_TD = module(x_TD, torch.ones(5, 1, dtype=torch.long), torch.ones(5, 1))
    torch.testing.assert_close(y_TD, expected_TD, rtol=1e-5, atol=1e-5)
