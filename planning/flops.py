"""FLOPs of a model, from its own shapes: the formula that bench.py and --plan share.

test_plan.py holds it against torch's FLOP counter on meta tensors.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch

import train_gpt
from train_gpt import GPT, Config


class Flops(NamedTuple):
    """Forward FLOPs per token.

    linear: all linear layers and gates, the head included; head: it alone; attention: causal, over
    a full row.
    """

    linear: float
    head: float
    attention: float

    @property
    def forward(self) -> float:
        return self.linear + self.attention

    @property
    def trained(self) -> float:
        """Forward and backward, which takes twice as much."""
        return 3 * self.forward


def shapes_of(cfg: Config) -> GPT:
    """The model without memory: its shapes alone."""
    with torch.device("meta"):
        return GPT(cfg)


def forward_flops(cfg: Config) -> Flops:
    """With all loops, over rows of TRAIN_SEQ_LEN."""
    return flops_of(shapes_of(cfg), cfg.num_loops, cfg.train_seq_len)


def flops_of(model: GPT, loops: int, length: int) -> Flops:
    """With so many loops, over rows of so many tokens.

    2 per weight and visit of its block; attention: 2 products of 2 * MODEL_DIM over half a row on
    average, as if the row were one document.
    """
    vocabulary, width = model.tok_emb.shape
    head = 2.0 * vocabulary * width
    encoder, decoder = model.order(loops)
    visited = [model.blocks[layer] for layer in [*encoder, *decoder]]
    outside = linear_flops(model) - sum(map(linear_flops, model.blocks))
    linear = outside + sum(map(linear_flops, visited))
    attention = len(visited) * 2.0 * width * (length + 1)
    return Flops(linear + head, head, attention)


# What multiplies each token by its `weight`
LINEAR = (train_gpt.Linear, train_gpt.HeadGate, train_gpt.GatedSmear)


def linear_flops(part: torch.nn.Module) -> float:
    """Of one pass through all linear layers and gates of this part, per token."""
    layers = [layer for layer in part.modules() if isinstance(layer, LINEAR)]
    return sum(2.0 * layer.weight.numel() for layer in layers)


def muon_matrices(model: GPT) -> dict[str, tuple[int, int]]:
    """Name -> shape of what Muon trains."""
    return {
        name: tuple(p.shape) for name, p in model.named_parameters() if p.role.optimiser == "muon"
    }


def muon_flops(shapes: Iterable[tuple[int, int]], steps: int) -> float:
    """Newton-Schulz: per iteration X X^T, its square, and their sum times X."""
    return sum(steps * (4.0 * min(s) ** 2 * max(s) + 2.0 * min(s) ** 3) for s in shapes)
