"""Our exchange inside of transformers' own mixture-of-experts models, where these are divided among ranks.

Since 5.23 or a little earlier transformers divides the experts of its models by itself, and finds the way of tokens to
them in a registry. Under the name "moewright" stands ours, with our kernels:

    from transformers.distributed import DistributedConfig
    from moewright.parallel.dispatcher import register

    register()
    config = DistributedConfig(tp_size=1, fsdp_size=4, ep_size=2, ep_implementation="moewright")
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=config)

Letters: T tokens, K experts a token, D model width, E experts, R rows that arrived here.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any, Final

import torch
import transformers
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from moewright.backbone.experts_registry import sums
from moewright.errors import UsageError
from moewright.moe.exchange import Exchange, LocalExchange
from moewright.parallel.exchange import AllToAllExchange, SharedTokens

NAME: Final = "moewright"
WHERE: Final = "transformers.distributed.expert_parallel"


def register() -> None:
    """Put our exchange into transformers' registry; UsageError where this version of transformers has none."""
    registry = getattr(import_module(WHERE), "EPImplementationInterface", None) if find_spec(WHERE) else None
    if registry is None:
        raise UsageError(f"transformers {transformers.__version__} has no registry of exchanges: install 5.23 or newer")
    registry.register(NAME, Dispatcher)


class Dispatcher:
    """What transformers calls in place of the forward pass of an experts module: it makes one for each."""

    def __init__(self, experts: nn.Module, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh) -> None:
        """`experts` has its part already; the ranks of `tp_mesh` have the same tokens."""
        self.experts = experts
        here: Any = experts.num_experts
        exchange: Exchange = LocalExchange(here)
        if ep_mesh.size() > 1:
            exchange = AllToAllExchange(here * ep_mesh.size(), ep_mesh.get_group())
        self.exchange = SharedTokens(exchange, tp_mesh.get_group()) if tp_mesh.size() > 1 else exchange

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(T, D), (T, K) experts among all, (T, K) weights -> (T, D); sums over choices in float32 or more."""
        weights_TK = top_k_weights.to(torch.promote_types(hidden_states.dtype, torch.float32))
        delivery = self.exchange.arrive(self.exchange.send(hidden_states, top_k_index, weights_TK, None))
        y_RD = sums(self.experts, delivery.rows_RD, delivery.weights_RL, delivery.permutation)
        return self.exchange.receive(delivery.ticket, y_RD).to(hidden_states.dtype)
