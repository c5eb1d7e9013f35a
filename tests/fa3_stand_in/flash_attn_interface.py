"""Stands in for FlashAttention 3's Python interface where it is not installed, with the flash
kernels that torch ships (FA2).

Put this folder on PYTHONPATH of a script that imports flash_attn_interface and cannot do without
(#1855). The script stays as it is, its attention is slower than with FlashAttention 3: a figure
that was measured with this must say so.
"""

import inspect

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn

KNOWN = inspect.signature(
    varlen_attn
).parameters  # causal masking and grouped heads are spelt otherwise in torch 2.10 to 2.13
CAUSAL = {"is_causal": True} if "is_causal" in KNOWN else {"window_size": (-1, 0)}
GROUPED = {"enable_gqa": True} if "enable_gqa" in KNOWN else {}


def flash_attn_func(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool = False
) -> torch.Tensor:
    """q (B, T, heads, d), k and v (B, T, kv heads, d) -> (B, T, heads, d)."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).transpose(
        1, 2
    )


# The order of arguments is FlashAttention's
def flash_attn_varlen_func(  # noqa: PLR0917
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    causal=False,
    window_size=(-1, -1),
):
    """Packed documents: q (T, heads, d), k and v (T, kv heads, d); cu_seqlens
    (documents + 1,) may repeat its last entry.
    """
    if not causal or window_size != (-1, -1):
        raise NotImplementedError("the stand-in knows whole causal windows only")
    if not GROUPED:
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    return varlen_attn(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **CAUSAL, **GROUPED
    )
