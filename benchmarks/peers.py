"""The layers of other projects, each with the weights of the case copied into it.

An adapter takes (case, weights, device, dtype) and is built only when asked for, so a project that is not installed
costs nothing. What goes wrong inside one is not handled here: the benchmark makes a row of it, with the reason.

Letters: T tokens, D model width, E experts, F expert width, K experts a token.
"""

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.cases import SMALL_CASE, Case, Weights
from benchmarks.layers import Dense, FeedForward, Layer, Loop, Ours, copy_into, gradient


class Unavailable(Exception):
    """A peer is not measured here; the message says why."""


class Transformers(Layer):
    """transformers' Mixtral block with one of its registered expert products."""

    def __init__(
        self, case: Case, weights: Weights, *, device: torch.device, dtype: torch.dtype, implementation: str
    ) -> None:
        if implementation == "batched_mm" and case.name != SMALL_CASE.name:
            copies = 3 * case.T * case.K * case.D * case.F * dtype.itemsize / 1e9
            raise Unavailable(f"copies an expert's weights for each assignment, {copies:.0f} GB here: case small only")
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

        super().__init__()
        config = MixtralConfig(
            hidden_size=case.D, intermediate_size=case.F, num_local_experts=case.E, num_experts_per_tok=case.K
        )
        config._experts_implementation = implementation
        with torch.device("meta"):
            block = MixtralSparseMoeBlock(config)
        self.block = block.to_empty(device=device).to(dtype)
        copy_into(self.block.gate.weight, weights.router_ED)
        copy_into(self.block.experts.gate_up_proj, torch.cat([weights.gate_EFD, weights.up_EFD], dim=1))
        copy_into(self.block.experts.down_proj, weights.down_EDF)

    def forward(self, x_TD: Tensor) -> Tensor:
        y_TD: Tensor = self.block(x_TD[None])[0]
        return y_TD

    def weight_gradients(self, first: int) -> dict[str, Tensor]:
        experts = self.block.experts
        gate_EFD, up_EFD = gradient(experts.gate_up_proj)[:first].chunk(2, dim=1)
        router_ED, down_EDF = gradient(self.block.gate.weight), gradient(experts.down_proj)[:first]
        return {"router": router_ED, "gate": gate_EFD, "up": up_EFD, "down": down_EDF}


class Torchtitan(Layer):
    """torchtitan's MoE without expert parallelism; its experts always compute in bfloat16."""

    def __init__(self, case: Case, weights: Weights, *, device: torch.device, dtype: torch.dtype) -> None:
        from torchtitan.models.common.linear import Linear
        from torchtitan.models.common.moe import GroupedExperts, MoE, RoutedExperts, TokenChoiceTopKRouter
        from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher

        super().__init__()
        config = MoE.Config(
            num_experts=case.E,
            routed_experts=RoutedExperts.Config(
                inner_experts=GroupedExperts.Config(dim=case.D, hidden_dim=case.F, num_experts=case.E),
                token_dispatcher=LocalTokenDispatcher.Config(num_experts=case.E, top_k=case.K),
            ),
            router=TokenChoiceTopKRouter.Config(
                num_experts=case.E,
                gate=Linear.Config(in_features=case.D, out_features=case.E),
                top_k=case.K,
                score_func="softmax",
                route_norm=True,
            ),
            load_balance_coeff=None,
        )
        with torch.device(device):
            self.moe = config.build().to(dtype)
        experts = self.moe.routed_experts.inner_experts
        copy_into(self.moe.router.gate.weight, weights.router_ED)
        copy_into(experts.w1_EFD, weights.gate_EFD)
        copy_into(experts.w3_EFD, weights.up_EFD)
        copy_into(experts.w2_EDF, weights.down_EDF)

    def forward(self, x_TD: Tensor) -> Tensor:
        y_TD: Tensor = self.moe(x_TD[None])[0]
        return y_TD

    def weight_gradients(self, first: int) -> dict[str, Tensor]:
        experts = self.moe.routed_experts.inner_experts
        router_ED, gate_EFD = gradient(self.moe.router.gate.weight), gradient(experts.w1_EFD)[:first]
        up_EFD, down_EDF = gradient(experts.w3_EFD)[:first], gradient(experts.w2_EDF)[:first]
        return {"router": router_ED, "gate": gate_EFD, "up": up_EFD, "down": down_EDF}


class DeepSpeed(Layer):
    """DeepSpeed's native MoE. Nothing is dropped: every expert is padded to the load of the fullest one."""

    def __init__(self, case: Case, weights: Weights, *, device: torch.device, dtype: torch.dtype) -> None:
        from deepspeed.moe.layer import MoE

        super().__init__()
        self.moe = MoE(
            hidden_size=case.D,
            expert=FeedForward(case.D, case.F, device=device, dtype=dtype),
            num_experts=case.E,
            k=case.K,
            drop_tokens=False,
            use_rts=False,
            top2_2nd_expert_sampling=False,
        ).to(device, dtype)
        self.experts = self.moe.deepspeed_moe.experts.deepspeed_experts
        copy_into(self.moe.deepspeed_moe.gate.wg.weight, weights.router_ED)
        for expert, gate, up, down in zip(self.experts, *weights[1:], strict=True):
            copy_into(expert.gate.weight, gate)
            copy_into(expert.up.weight, up)
            copy_into(expert.down.weight, down)

    def forward(self, x_TD: Tensor) -> Tensor:
        y_TD: Tensor = self.moe(x_TD)[0]
        return y_TD

    def weight_gradients(self, first: int) -> dict[str, Tensor]:
        stacked = {
            name: torch.stack([gradient(expert.get_submodule(name).weight) for expert in self.experts[:first]])
            for name in ("gate", "up", "down")
        }
        return {"router": gradient(self.moe.deepspeed_moe.gate.wg.weight), **stacked}


class Megatron(Layer):
    """Megatron-Core's MoE on one rank, with its sequential experts (the grouped ones need compiled extensions)."""

    def __init__(self, case: Case, weights: Weights, *, device: torch.device, dtype: torch.dtype) -> None:
        from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
        from megatron.core.transformer.moe.moe_layer import MoELayer
        from megatron.core.transformer.transformer_config import TransformerConfig

        super().__init__()
        _one_megatron_rank(device)
        config = TransformerConfig(
            num_layers=1,
            num_attention_heads=1,
            hidden_size=case.D,
            ffn_hidden_size=case.F,
            moe_ffn_hidden_size=case.F,
            num_moe_experts=case.E,
            moe_router_topk=case.K,
            moe_router_load_balancing_type="none",
            moe_router_dtype="fp32",
            moe_token_dispatcher_type="allgather",
            gated_linear_unit=True,
            activation_func=F.silu,
            add_bias_linear=False,
            use_cpu_initialization=True,
            params_dtype=dtype,
            bf16=dtype == torch.bfloat16,
        )
        spec = get_moe_module_spec(use_te=False, num_experts=case.E)
        self.moe = MoELayer(config, spec.submodules).to(device)
        self.experts = self.moe.experts.local_experts
        copy_into(self.moe.router.weight, weights.router_ED)
        for expert, gate, up, down in zip(self.experts, *weights[1:], strict=True):
            copy_into(expert.linear_fc1.weight, torch.cat([gate, up]))
            copy_into(expert.linear_fc2.weight, down)

    def forward(self, x_TD: Tensor) -> Tensor:
        y_TBD: Tensor = self.moe(x_TD[:, None])[0]
        return y_TBD[:, 0]

    def weight_gradients(self, first: int) -> dict[str, Tensor]:
        first_EHD = torch.stack([gradient(expert.linear_fc1.weight) for expert in self.experts[:first]])
        down_EDF = torch.stack([gradient(expert.linear_fc2.weight) for expert in self.experts[:first]])
        gate_EFD, up_EFD = first_EHD.chunk(2, dim=1)
        return {"router": gradient(self.moe.router.weight), "gate": gate_EFD, "up": up_EFD, "down": down_EDF}


def _one_megatron_rank(device: torch.device) -> None:
    from megatron.core import parallel_state
    from torch import distributed

    if not distributed.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()


class ScatterMoE(Layer):
    """ScatterMoE's gated experts (the up half stands first) behind a plain router."""

    def __init__(self, case: Case, weights: Weights, *, device: torch.device, dtype: torch.dtype) -> None:
        if device.type != "cuda":
            raise Unavailable("its Triton kernels need a GPU")
        from scattermoe.mlp import GLUMLP

        super().__init__()
        self.K = case.K
        self.router = nn.Linear(case.D, case.E, bias=False, device=device, dtype=dtype)
        self.moe = GLUMLP(case.D, case.F, case.E, case.K).to(device, dtype)
        copy_into(self.router.weight, weights.router_ED)
        copy_into(self.moe.experts.weight, torch.cat([weights.up_EFD, weights.gate_EFD], dim=1))
        copy_into(self.moe.output_experts.weight, weights.down_EDF)

    def forward(self, x_TD: Tensor) -> Tensor:
        chosen_TK, experts_TK = self.router(x_TD).float().topk(self.K, dim=-1)
        y_TD: Tensor = self.moe(x_TD, chosen_TK.softmax(dim=-1).to(x_TD.dtype), experts_TK)
        return y_TD

    def weight_gradients(self, first: int) -> dict[str, Tensor]:
        up_EFD, gate_EFD = gradient(self.moe.experts.weight)[:first].chunk(2, dim=1)
        router_ED, down_EDF = gradient(self.router.weight), gradient(self.moe.output_experts.weight)[:first]
        return {"router": router_ED, "gate": gate_EFD, "up": up_EFD, "down": down_EDF}


class SonicMoE(Layer):
    """SonicMoE's layer; rows of gate and up alternate in its first weight. bfloat16 on Hopper only."""

    def __init__(self, case: Case, weights: Weights, *, device: torch.device, dtype: torch.dtype) -> None:
        if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
            raise Unavailable("its kernels need a Hopper GPU or a newer one")
        if dtype != torch.bfloat16:
            raise Unavailable("its kernels take bfloat16 only")
        from sonicmoe import MoE
        from sonicmoe.enums import ActivationType

        super().__init__()
        with torch.device(device):
            self.moe = MoE(case.E, case.K, case.D, case.F, ActivationType.SWIGLU, False, 0.02).to(dtype)
        copy_into(self.moe.router.weight, weights.router_ED)
        copy_into(self.moe.c_fc.weight, torch.stack([weights.gate_EFD, weights.up_EFD], dim=2).flatten(1, 2))
        copy_into(self.moe.c_proj.weight, weights.down_EDF)

    def forward(self, x_TD: Tensor) -> Tensor:
        y_TD: Tensor = self.moe(x_TD[None])[0][0]
        return y_TD

    def weight_gradients(self, first: int) -> dict[str, Tensor]:
        first_EHD = gradient(self.moe.c_fc.weight)[:first]
        router_ED, down_EDF = gradient(self.moe.router.weight), gradient(self.moe.c_proj.weight)[:first]
        return {"router": router_ED, "gate": first_EHD[:, ::2], "up": first_EHD[:, 1::2], "down": down_EDF}


def transformers_with(implementation: str) -> Callable[..., Layer]:
    """An adapter for one of transformers' expert products."""

    def build(case: Case, weights: Weights, **where: Any) -> Layer:
        return Transformers(case, weights, implementation=implementation, **where)

    return build


PEERS: Final[dict[str, Callable[..., Layer]]] = {
    "transformers-eager": transformers_with("eager"),
    "transformers-grouped_mm": transformers_with("grouped_mm"),
    "transformers-batched_mm": transformers_with("batched_mm"),
    "torchtitan": Torchtitan,
    "deepspeed": DeepSpeed,
    "megatron": Megatron,
    "scattermoe": ScatterMoE,
    "sonicmoe": SonicMoE,
}


def build(name: str, case: Case, weights: Weights, *, device: torch.device, dtype: torch.dtype) -> Layer:
    """The implementation of that name, a peer or not; `ours:KERNEL` is our layer with that kernel.

    Raises whatever a peer fails with, and `SystemExit` for a name that there is not.
    """
    if name == "ours" or name.startswith("ours:"):
        kernel = name.partition(":")[2] or "auto"
        return Ours(case, weights, device=device, dtype=dtype, kernel=kernel)
    builders: dict[str, Callable[..., Layer]] = {"loop": Loop, "dense": Dense, **PEERS}
    if name not in builders:
        raise SystemExit(f"implementation {name!r}: choose from ours, ours:KERNEL, {', '.join(builders)}")
    return builders[name](case, weights, device=device, dtype=dtype)
