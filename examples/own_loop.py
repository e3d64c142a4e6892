"""A training loop of one's own, on one process or on several.

    python examples/own_loop.py
    torchrun --nproc-per-node 4 examples/own_loop.py --layout E+D+Z --ep 2

A small mixture learns to count. Both commands print the same losses, up to rounding. The calls are explained in
docs/own-loop.md.
"""

import argparse
from dataclasses import replace

import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from moewright.backbone.blocks import routing_step
from moewright.backbone.graft import graft
from moewright.moe.config import MoEConfig
from moewright.parallel.apply import Parallel, apply, degrees_for
from moewright.parallel.config import ParallelConfig
from moewright.parallel.gradients import clip_gradients
from moewright.parallel.mesh import make_meshes
from moewright.parallel.ranks import joined

ROWS, LENGTH, VOCABULARY = 16, 12, 32


def make_model() -> torch.nn.Module:
    """A llama of two layers whose blocks are mixtures of 8 experts, the same on all ranks."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=VOCABULARY,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    moe = MoEConfig(hidden_size=32, expert_size=32, num_experts=8, top_k=2, balance_loss=0.0)
    graft(model, {0: moe, 1: moe})
    return model.train()


def batch_of(step: int) -> torch.Tensor:
    """(ROWS, LENGTH) token ids that count up from a random one; the same on all ranks."""
    generator = torch.Generator().manual_seed(step)
    return (torch.randint(0, VOCABULARY, (ROWS, 1), generator=generator) + torch.arange(LENGTH)) % VOCABULARY


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout")
    parser.add_argument("--ep", type=int)
    parser.add_argument("--tp", type=int)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()

    with joined(torch.device("cpu")) as ranks:  # of torchrun, or a process alone; "cuda" joins GPUs
        model = make_model()
        config = ParallelConfig(layout=options.layout, ep=options.ep, tp=options.tp)
        degrees = degrees_for(model, config, ranks=ranks.size)
        ranks = replace(ranks, tp=degrees.tp)  # those of a slice have the same rows
        if ranks.size > 1:
            apply(model, make_meshes(degrees, device_type="cpu"))
        parallel = Parallel(ranks=ranks, degrees=degrees)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)  # after `apply`, which makes other parameters
        routing = routing_step(model, ranks.group, copies=degrees.tp)

        for step in range(options.steps):
            ids = batch_of(step)
            mine = ids.chunk(ranks.data_size)[ranks.data_rank]
            targets = ROWS * (LENGTH - 1)  # of all ranks: gradients are sums over ranks

            routing.begin_micro_batch({"decoder": mine.numel() / ids.numel()})
            logits = model(input_ids=mine, use_cache=False).logits
            loss = (
                functional.cross_entropy(logits[:, :-1].flatten(0, 1), mine[:, 1:].flatten(), reduction="sum") / targets
            )
            parallel.begin_backward(model, last=True)
            loss.backward()
            routing.after_backward()

            total, norm = clip_gradients(model.parameters(), max_norm=1.0, loss=loss.detach(), ranks=ranks)
            optimizer.step()
            optimizer.zero_grad()
            routing.end_step()
            if ranks.is_first and (step + 1) % 10 == 0:
                print(f"step {step + 1}  loss {total:.4f}  gradient norm {norm:.4f}")


if __name__ == "__main__":
    main()
