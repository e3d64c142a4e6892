"""How many parameters a model has, uses for one token, and multiplies with."""

from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from moewright.backbone.blocks import moe_layers
from moewright.backbone.skeleton import embedding_of, has_tied_head


@dataclass(frozen=True)
class Counts:
    """Parameters of a model, tied ones counted once."""

    total: int
    active: int
    """Without the experts that a token does not choose."""
    multiplied: int
    """Active parameters that a token is multiplied with: without the table of input embeddings, but with the output
    projection, also when the two are tied. Twice this is the FLOPs of a forward pass for a token, attention aside."""


def parameter_counts(model: PreTrainedModel) -> Counts:
    """Count the parameters of a dense or sparse model, on any device."""
    total = sum(parameter.numel() for parameter in model.parameters())
    idle = sum(
        (moe.config.num_experts - moe.config.top_k) * sum(w.numel() // len(w) for w in moe.experts.parameters())
        for moe in moe_layers(model).values()
    )
    embedding = 0 if has_tied_head(model) else embedding_of(model).numel()
    return Counts(total=total, active=total - idle, multiplied=total - idle - embedding)


def bytes_of(tensor: Tensor) -> int:
    """Size of a tensor's data, also on meta."""
    return tensor.numel() * tensor.element_size()
