"""Golden numbers of other scripts: their weights, drawn from the name of each role, our model with
them, all of it in float64, and how gradients are summed up in the files.
"""

import functools
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train_gpt
from train_gpt import BOS, GPT, Config

# What a script takes for RMSNorm's epsilon: that of float32, in every precision
EPSILON = torch.finfo(torch.float32).eps


# ── Weights and tokens: drawn from the name of their role ─────────────────────────────────────────
def generator(role: str) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(zlib.crc32(role.encode())))


def draw32(role: str, shape, std: float = 1.0, mean: float = 0.0) -> np.ndarray:
    numbers = mean + std * generator(role).standard_normal(tuple(shape))
    return numbers.astype(np.float32)


drawn_once = functools.cache(draw32)


def draw(role: str, shape, std: float = 1.0, mean: float = 0.0) -> torch.Tensor:
    """Normal numbers that float32 can hold, in the default dtype."""
    return torch.tensor(draw32(role, shape, std, mean)).to(torch.get_default_dtype())


def draw_tokens(role: str, n: int, vocabulary: int, document_starts) -> torch.Tensor:
    tokens = generator(role).integers(2, vocabulary, size=n)
    tokens[list(document_starts)] = BOS
    return torch.tensor(tokens)


WIDTH = 64
# Last parts of a role: (mean, standard deviation)
SPREAD = {
    "embedding": (0.0, 0.2),
    "query": (0.0, WIDTH**-0.5),
    "key": (0.0, WIDTH**-0.5),
    "value": (0.0, WIDTH**-0.5),
    "output": (0.0, WIDTH**-0.5),
    "mlp.up": (0.0, WIDTH**-0.5),
    "mlp.down": (0.0, 0.04),
    "attention.scale": (1.0, 0.1),
    "mlp.scale": (1.0, 0.1),
    "resid_mix.current": (1.0, 0.1),
    "resid_mix.origin": (0.1, 0.1),
    "q_gain": (5.0, 0.3),
    "skip_weight": (1.0, 0.2),
    "smear.gate": (0.0, 1.0),
    "smear.weight": (0.0, 1.5),
    "smear.lambda": (0.5, 0.1),
    "attention.gate": (0.0, 0.5),
    "skip_gate": (0.0, 0.5),
    "lane.post": (1.0, 0.2),
    "lane.residual": (1.1, 0.1),
    "softcap.positive": (0.0, 0.0),
    "softcap.negative": (0.0, 0.0),
    "bigram.table": (0.0, 1.0),
    "bigram.projection": (0.0, 0.25),
    "bigram.scale": (0.3, 0.03),
    "value_embedding.table": (0.0, 1.0),
    "value_embedding.projection": (0.0, 8**-0.5),
    "value_embedding.scale": (1.0, 0.1),
    "value_embedding.layer_scale": (1.0, 0.3),
}
# Ours: theirs
ROLES = {
    "tok_emb": "embedding",
    "skip_weights": "skip_weight",
    "smear.gate": "smear.gate",
    "gated_smear.weight": "smear.weight",
    "gated_smear.strength": "smear.lambda",
    "attn.gate.weight": "attention.gate",
    "skip.gate": "skip_gate",
    "lanes.post": "lane.post",
    "lanes.residual": "lane.residual",
    "softcap.positive": "softcap.positive",
    "softcap.negative": "softcap.negative",
    "bigram.embed": "bigram.table",
    "bigram.proj.weight": "bigram.projection",
    "bigram.scale": "bigram.scale",
    "value_embed.embed": "value_embedding.table",
    "value_embed.proj.weight": "value_embedding.projection",
    "value_embed.scale": "value_embedding.scale",
    "value_embed.block_scales": "value_embedding.layer_scale",
    "attn.c_q.weight": "attention.query",
    "attn.c_k.weight": "attention.key",
    "attn.c_v.weight": "attention.value",
    "attn.proj.weight": "attention.output",
    "attn.q_gain": "q_gain",
    "attn_scale": "attention.scale",
    "mlp_scale": "mlp.scale",
    "mlp.fc.weight": "mlp.up",
    "mlp.proj.weight": "mlp.down",
}


def roles_of(name: str) -> list[str]:
    """The roles that a parameter of ours holds: one, or one per row."""
    prefix = ""
    if name.startswith("blocks."):
        _, layer, name = name.split(".", 2)
        prefix = f"block{layer}."
    if name == "resid_mix":
        return [prefix + "resid_mix.current", prefix + "resid_mix.origin"]
    return [prefix + ROLES[name]]


def spread_of(role: str) -> tuple[float, float]:
    return next(spread for ending, spread in SPREAD.items() if role.endswith(ending))


def golden_weight(name: str, shape: torch.Size) -> torch.Tensor:
    roles = roles_of(name)
    rows = shape if len(roles) == 1 else shape[1:]
    # A table of one column less than none: () is drawn as one number
    drawn = []
    for role in roles:
        mean, std = spread_of(role)
        drawn.append(torch.tensor(drawn_once(role, tuple(rows) or (1,), std, mean)))
    return torch.stack(drawn).view(shape)


def by_role(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Parameter name -> tensor as role -> tensor; each element of the layer scales has its own."""
    found = {}
    for name, tensor in tensors.items():
        roles = roles_of(name)
        if name.endswith("block_scales"):
            roles = [f"{roles[0]}.{place}" for place in range(len(tensor))]
        parts = [tensor] if len(roles) == 1 and not name.endswith("block_scales") else tensor
        found.update(zip(roles, parts, strict=True))
    return found


# ── The program in float64 ────────────────────────────────────────────────────────────────────────
class DoubleTorch:
    """torch, but that its float32 is float64."""

    float32 = torch.float64

    def __getattr__(self, name: str):
        return getattr(torch, name)


def rms_norm_of_the_scripts(x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, (x.shape[-1],), eps=EPSILON)


@pytest.fixture
def exact(monkeypatch):
    """All that train_gpt.py does in float32 happens in float64."""
    monkeypatch.setattr(train_gpt, "torch", DoubleTorch())
    monkeypatch.setattr(train_gpt, "rms_norm", rms_norm_of_the_scripts)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def golden_model(cfg: Config) -> GPT:
    model = GPT(cfg, torch.get_default_dtype())
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(golden_weight(name, p.shape))
    return model


def gradient_summary(gradient: torch.Tensor) -> list[float]:
    """L2 norm, then the entries at 0, n // 3, 2 n // 3 and n - 1; all, where there are few."""
    flat = gradient.flatten()
    n = len(flat)
    places = range(n) if n <= 3 else [0, n // 3, 2 * n // 3, n - 1]
    return [flat.norm().item(), *[flat[place].item() for place in places]]


def check_gradients(model: GPT, golden: dict[str, list[float]], tolerance: float = 1e-8) -> None:
    found = by_role({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found.keys() == golden.keys()
    for role, expected in golden.items():
        # A file has 11 digits, and small entries are sums of large ones
        close = pytest.approx(expected, rel=tolerance, abs=tolerance * expected[0])
        assert gradient_summary(found[role])[: len(expected)] == close, role
