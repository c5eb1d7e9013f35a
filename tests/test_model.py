"""The model: every technique against the specification written again, and absent when it is off.

Would have caught: #1851's SmearGate that leaks across documents, a score path that differs from the
training path (one forward path serves both), NTK bases that depend on the length that is scored
(#975), a bigram table whose last bucket is also a hash, an RMSNorm with bf16's epsilon, #199's
toggles whose parameters nothing used, and any look-ahead.

A technique is one section: its specification, which says where it acts (`acts`), the knobs that
switch it on and the tensors that it adds (TECHNIQUES), and tests of its own.
"""

import math
import sys
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import train_gpt
from train_gpt import (
    BOS,
    GPT,
    Config,
    Refusal,
    Run,
    apply_rotary,
    attention_function,
    choose_attention,
    rms_norm,
    rotary_tables,
    sdpa,
)

SMALL = dict(
    vocab_size=64,
    num_layers=3,
    model_dim=32,
    num_heads=4,
    num_kv_heads=2,
    train_seq_len=24,
    train_batch_tokens=48,
    eval_stride=8,
)
PLAIN = dict(smear_gate=False)
# name: (what switches it on, the tensors that it adds)
TECHNIQUES = {
    "partial_rope": (dict(rope_dims=4), set()),
    "negative_slope": (dict(negative_slope=0.3), set()),
}
# Those of which one excludes another
ONE_OF = {}
# Where: the specifications of what acts there, each a function that does nothing where it is off
PLACES = ("before_norm", "after_norm", "values", "gathered", "gates", "norms", "base")
SPEC = {place: [] for place in PLACES}
SPEC["hidden"] = []  # of each pair (token, key): whether the token attends to the key


def acts(place: str):
    """Puts the specification of a technique into its place."""

    def mark(function):
        SPEC[place].append(function)
        return function

    return mark


def config(**knobs) -> Config:
    return Config(**{**SMALL, **knobs})


def make(cfg: Config, dtype: torch.dtype = torch.float32) -> GPT:
    """A model in which every parameter is random and matters."""
    generator = torch.Generator().manual_seed(5)
    model = GPT(cfg, dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model


def rows(
    cfg: Config, n: int = 2, length: int = 24, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids and targets with document starts here and there."""
    tokens = torch.randint(
        2, cfg.vocab_size, (n, length + 1), generator=torch.Generator().manual_seed(seed)
    )
    tokens[:, [0, 7, 15]] = BOS
    return tokens[:, :-1], tokens[:, 1:]


# ── the specification, written again: one row, plain functions, fp64 ──
def rms(x):
    return x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()


def spec_rotate(x, dims, base):
    """x (T, d): pairs (x_k, x_{k + dims/2}), complex numbers, turned by -t base^(-2k / dims)."""
    half = dims // 2
    frequency = base ** (-2.0 * torch.arange(half).double() / dims)
    angle = torch.arange(len(x))[:, None].double() * frequency
    turned = torch.complex(x[:, :half], x[:, half:dims]) * torch.exp(-1j * angle)
    return torch.cat((turned.real, turned.imag, x[:, dims:]), 1)


def spec_attention(w, cfg, i, x, ids):
    head_dim = cfg.model_dim // cfg.num_heads
    group_size = cfg.num_heads // cfg.num_kv_heads
    dims = cfg.rope_dims or head_dim
    base = cfg.rope_base
    for technique in SPEC["base"]:
        base = technique(cfg, dims, base)
    q, k, v = (x @ w[f"blocks.{i}.attn.c_{name}.weight"].T for name in "qkv")
    for technique in SPEC["values"]:
        v = technique(w, cfg, i, ids, v)
    later = ~torch.ones(len(x), len(x), dtype=bool).tril()
    for technique in SPEC["hidden"]:
        later = later | technique(cfg, ids)
    heads = []
    for head in range(cfg.num_heads):
        own = slice(head * head_dim, (head + 1) * head_dim)
        first = head // group_size * head_dim
        shared = slice(first, first + head_dim)
        own_q = w[f"blocks.{i}.attn.q_gain"][head] * spec_rotate(rms(q[:, own]), dims, base)
        own_k = spec_rotate(rms(k[:, shared]), dims, base)
        own_v = v[:, shared]
        scores = (own_q @ own_k.T / math.sqrt(head_dim)).masked_fill(later, -math.inf)
        y = scores.softmax(-1) @ own_v
        for technique in SPEC["gathered"]:
            y = technique(cfg, i, y, own_v)
        for technique in SPEC["gates"]:
            y = y * technique(w, cfg, i, head, x)[:, None]
        heads.append(y)
    return torch.cat(heads, 1) @ w[f"blocks.{i}.attn.proj.weight"].T


def spec_mlp(w, cfg, i, x):
    z = x @ w[f"blocks.{i}.mlp.fc.weight"].T
    z = torch.where(z > 0, z, cfg.negative_slope * z) ** 2
    return z @ w[f"blocks.{i}.mlp.proj.weight"].T


def spec_norm(cfg, i, x):
    x = rms(x)
    for technique in SPEC["norms"]:
        x = technique(cfg, i, x)
    return x


def spec_embedding(w, cfg, ids):
    """(T,) token ids -> (T, dim): what enters the first block."""
    x = w["tok_emb"][ids]
    for technique in SPEC["before_norm"]:
        x = technique(w, cfg, ids, x)
    x = rms(x)
    for technique in SPEC["after_norm"]:
        x = technique(w, cfg, ids, x)
    return x


def spec_model(w, cfg, ids, targets):
    """(T,) token ids -> (T,) nats."""
    x = x0 = spec_embedding(w, cfg, ids)
    visits = spec_visits(cfg)
    encoders = len(visits) // 2
    stack = []
    for place, i in enumerate(visits):
        if place < encoders:
            x = spec_block(w, cfg, i, x, x0, ids)
            stack.append(x)
            continue
        if cfg.parallel_start_layer and i == cfg.parallel_start_layer:
            x = torch.stack((x, x))
        lanes = x.dim() == 3
        if stack:
            a = spec_skip(w, cfg, place - encoders, x[0] if lanes else x, stack.pop())
            x = torch.stack((a, x[1])) if lanes else a
        x = (spec_lanes if lanes else spec_block)(w, cfg, i, x, x0, ids)
    if x.dim() == 3:
        x = {"mean": x.mean(0), "attn": x[0], "mlp": x[1]}[cfg.parallel_final_lane]
    z = spec_softcap(w, cfg, rms(x) @ w["tok_emb"].T)
    return z.logsumexp(1) - z[torch.arange(len(ids)), targets]


def spec_attention_adds(w, cfg, i, x, x0, ids):
    """(the stream with the embedding mixed in, what attention adds to it)."""
    mix = w[f"blocks.{i}.resid_mix"]
    x = mix[0] * x + mix[1] * x0
    return x, w[f"blocks.{i}.attn_scale"] * spec_attention(w, cfg, i, spec_norm(cfg, i, x), ids)


def spec_mlp_adds(w, cfg, i, x):
    return w[f"blocks.{i}.mlp_scale"] * spec_mlp(w, cfg, i, spec_norm(cfg, i, x))


def spec_block(w, cfg, i, x, x0, ids):
    mixed, attention = spec_attention_adds(w, cfg, i, x, x0, ids)
    x = mixed + attention
    if 0 <= cfg.parallel_residual_start <= i:
        return x + spec_mlp_adds(w, cfg, i, mixed)
    return x + spec_mlp_adds(w, cfg, i, x)


def orthonormal(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(what must be the identity, the identity): of the rows or of the columns, the fewer ones."""
    tall = matrix.shape[0] > matrix.shape[1]
    gram = matrix.T @ matrix if tall else matrix @ matrix.T
    return gram, torch.eye(len(gram))


# ── BigramHash ──
TECHNIQUES["bigram"] = (
    dict(bigram_vocab_size=17, bigram_dim=8),
    {"bigram.embed", "bigram.proj.weight", "bigram.scale"},
)


@acts("before_norm")
def spec_bigram(w, cfg, ids, x):
    if not cfg.bigram_vocab_size:
        return x
    last = cfg.bigram_vocab_size - 1
    t = ids.tolist()
    buckets = [last] + [((36313 * t[i]) ^ (27191 * t[i - 1])) % last for i in range(1, len(t))]
    return x + w["bigram.scale"] * w["bigram.embed"][buckets] @ w["bigram.proj.weight"].T


def test_bigram_rows_start_in_the_last_bucket_and_no_hash_falls_there():
    cfg = config(bigram_vocab_size=7, bigram_dim=7, model_dim=8, num_heads=2)
    bigram = train_gpt.BigramHash(cfg)
    with torch.no_grad():
        bigram.embed.copy_(torch.eye(7))
        bigram.proj.weight.copy_(torch.eye(8)[:, :7])
        bigram.scale.fill_(1)
    ids = torch.randint(0, 64, (50, 30))
    bucket = bigram(torch.zeros(50, 30, 8), ids).argmax(-1)
    assert (bucket[:, 0] == 6).all() and set(bucket[:, 1:].flatten().tolist()) == set(range(6))
    assert bucket[0, 5] == ((36313 * int(ids[0, 5])) ^ (27191 * int(ids[0, 4]))) % 6


def test_bigram_hash_of_the_seed_configuration():
    ids = torch.tensor([[1, 1023, 5]])
    bigram = train_gpt.BigramHash(Config(bigram_vocab_size=10240, bigram_dim=1, model_dim=16))
    with torch.no_grad():
        bigram.embed.copy_(torch.arange(10240.0)[:, None])
        bigram.proj.weight.fill_(1)
        bigram.scale.fill_(1)
    # (36313 * 1023) ^ (27191 * 1) and (36313 * 5) ^ (27191 * 1023), modulo 10239
    assert bigram(torch.zeros(1, 3, 16), ids)[0, :, 0].tolist() == [
        10239,
        37141520 % 10239,
        27964660 % 10239,
    ]


def test_bigram_starts_with_a_table_of_zeros():
    bigram = GPT(config(bigram_vocab_size=17, bigram_dim=8)).bigram
    assert not bigram.embed.any() and bigram.scale == 0.05
    torch.testing.assert_close(*orthonormal(bigram.proj.weight), rtol=0, atol=1e-5)


def test_bigram_projection_gain():
    weight = GPT(config(bigram_vocab_size=9, bigram_proj_gain=20**-0.5)).bigram.proj.weight
    torch.testing.assert_close(weight @ weight.T, torch.eye(32) / 20, rtol=0, atol=1e-5)


# ── SmearGate ──
TECHNIQUES["smear_gate"] = (dict(smear_gate=True), {"smear.gate"})


def spec_smear(w, cfg, ids, x):
    g = w["smear.gate"].sigmoid()
    previous = torch.cat((0 * x[:1], x[:-1]))
    if cfg.smear_mask_bos:
        previous[ids == BOS] = 0
    return (1 - g) * x + g * previous


@acts("before_norm")
def spec_smear_before_norm(w, cfg, ids, x):
    on = cfg.smear_gate and cfg.smear_pos == "pre_norm"
    return spec_smear(w, cfg, ids, x) if on else x


@acts("after_norm")
def spec_smear_after_norm(w, cfg, ids, x):
    on = cfg.smear_gate and cfg.smear_pos == "post_norm"
    return spec_smear(w, cfg, ids, x) if on else x


def test_smear_blends_each_dimension_with_the_previous_token():
    smear, x = train_gpt.SmearGate(config()), torch.randn(1, 3, 32)
    assert torch.equal(smear.gate, torch.zeros(32))  # so half of each at the start
    shifted = torch.stack((0 * x[:, 0], x[:, 0], x[:, 1]), 1)
    torch.testing.assert_close(smear(x, torch.zeros(1, 3)), 0.5 * x + 0.5 * shifted)
    with torch.no_grad():
        smear.gate[:2] = torch.tensor([50.0, -50.0])
    y = smear(x, torch.zeros(1, 3))
    torch.testing.assert_close(y[0, :, 0], F.pad(x[0, :-1, 0], (1, 0)))
    torch.testing.assert_close(y[0, :, 1], x[0, :, 1])


@pytest.mark.parametrize("smear_pos", ("pre_norm", "post_norm"))
@pytest.mark.parametrize("masked", (False, True))
def test_smear_crosses_a_document_start_only_unmasked(smear_pos, masked):
    cfg = config(smear_pos=smear_pos, smear_mask_bos=masked)
    # Its zero projections let no other information through
    model, (ids, targets) = GPT(cfg), rows(config(), 1)
    other = ids.clone()
    other[0, 6] = 2 + (ids[0, 6] + 7) % 60  # the token before the document start at 7
    change = (model(ids, targets) - model(other, targets))[0]
    assert change[6] != 0 and bool(change[7] != 0) != masked and not change[8:].any()


# ── gated SmearGate ──
ONE_OF["gated_smear"] = (
    dict(smear_gate_enabled=True, gate_window=7),
    {"gated_smear.weight", "gated_smear.strength"},
)


@acts("before_norm")
def spec_gated_smear(w, cfg, ids, x):
    if not cfg.smear_gate_enabled:
        return x
    previous = torch.cat((0 * x[:1], x[:-1]))
    if cfg.smear_mask_bos:
        previous[ids == BOS] = 0
    asked = x[:, : cfg.gate_window] @ w["gated_smear.weight"][0]
    return x + w["gated_smear.strength"] * asked.sigmoid()[:, None] * previous


@pytest.mark.parametrize("masked", (False, True))
def test_the_gated_smear_crosses_a_document_start_only_unmasked(masked):
    cfg = config(**PLAIN, smear_gate_enabled=True, smear_mask_bos=masked)
    model, (ids, targets) = GPT(cfg), rows(config(), 1)
    plain = GPT(config(**PLAIN))
    plain.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(model(ids, targets), plain(ids, targets))  # it starts as the identity
    with torch.no_grad():
        model.gated_smear.strength.fill_(0.5)
    other = ids.clone()
    other[0, 6] = 2 + (ids[0, 6] + 7) % 60  # the token before the document start at 7
    change = (model(ids, targets) - model(other, targets))[0]
    assert change[6] != 0 and bool(change[7] != 0) != masked and not change[8:].any()


# ── ValueEmbedding ──
TECHNIQUES["value_embedding"] = (
    dict(ve_enabled=True, ve_dim=8, ve_layers="0,2"),
    {f"value_embed.{name}" for name in ("embed", "proj.weight", "scale", "block_scales")},
)


@acts("values")
def spec_value_embedding(w, cfg, i, ids, v):
    blocks = [int(number) for number in cfg.ve_layers.split(",")]
    if not cfg.ve_enabled or i not in blocks:
        return v
    table = w["value_embed.scale"] * w["value_embed.embed"][ids] @ w["value_embed.proj.weight"].T
    return v + w["value_embed.block_scales"][blocks.index(i)] * table


def test_the_value_embedding_is_scaled_per_block():
    ve = train_gpt.ValueEmbedding(config(**ALL))
    with torch.no_grad():
        ve.block_scales.copy_(torch.tensor([2.0, -1.0]))
    ids = rows(config())[0]
    out = ve(ids, torch.float32)
    assert out.keys() == {0, 2} and out[0].shape == (2, 24, 16)
    torch.testing.assert_close(out[0], 2 * 0.1 * ve.embed[ids] @ ve.proj.weight.T)
    torch.testing.assert_close(out[2], -0.5 * out[0])


def test_a_table_of_the_width_where_it_is_added_has_no_projection():
    """As #989's and #975's: of two matrices in a row one is enough where neither is narrow."""
    tables = dict(bigram_vocab_size=9, ve_enabled=True, ve_layers="0")
    model = GPT(config(**tables, bigram_dim=32, ve_dim=16))
    names = [name for name, _ in model.named_parameters() if "proj" in name]
    assert not any("bigram" in name or "value_embed" in name for name in names)
    ids = rows(config())[0]
    ve = model.value_embed
    torch.testing.assert_close(ve(ids, torch.float32)[0], 0.1 * ve.embed[ids])
    with torch.no_grad():
        model.bigram.embed += 1
    assert (model.bigram(torch.zeros(2, 24, 32), ids) == model.bigram.scale).all()

    narrower = GPT(config(**tables, bigram_dim=31, ve_dim=15))
    assert narrower.bigram.proj.weight.shape == (32, 31)
    assert narrower.value_embed.proj.weight.shape == (16, 15)


def test_the_value_embedding_starts_small(run):
    ve = train_gpt.build_model(config(**ALL), run, sdpa).value_embed
    assert ve.embed.std().item() == pytest.approx(0.01, rel=0.1)
    assert ve.scale.item() == pytest.approx(0.1) and (ve.block_scales == 1).all()
    torch.testing.assert_close(*orthonormal(ve.proj.weight), rtol=0, atol=1e-5)


# ── XSA ──
TECHNIQUES["xsa"] = (dict(xsa_last_n=2), set())


@acts("gathered")
def spec_xsa(cfg, i, y, own_v):
    if i < cfg.num_layers - cfg.xsa_last_n:
        return y
    unit = own_v / own_v.norm(dim=1, keepdim=True)
    return y - (y * unit).sum(1, keepdim=True) * unit


def test_xsa_leaves_nothing_along_the_own_value():
    y, v = torch.randn(2, 5, 8, 16), torch.randn(2, 5, 2, 16)
    out = train_gpt.exclude_self(y, v, y)
    own = v.repeat_interleave(4, dim=2)  # head h -> kv head h // 4
    assert (F.cosine_similarity(out, own, dim=-1).abs() < 1e-5).all()
    removed = y - out
    assert (F.cosine_similarity(removed, own, dim=-1).abs() > 1 - 1e-4).all()


# ── document masks ──
TECHNIQUES["doc_mask"] = (dict(doc_mask=True, doc_max_len=6), set())


@acts("hidden")
def spec_doc_mask(cfg, ids):
    other = torch.zeros(len(ids), len(ids), dtype=bool)
    if not cfg.doc_mask:
        return other
    begin = 0
    for t, token in enumerate(ids.tolist()):
        if token == BOS or t - begin == cfg.doc_max_len:
            begin = t
        other[t, :begin] = True
    return other


# ── gates of heads ──
GATES = {f"blocks.{i}.attn.gate.weight" for i in range(3)}
TECHNIQUES["sparse_gate"] = (
    dict(sparse_attn_gate_enabled=True, sparse_attn_gate_scale=0.7, gate_window=5),
    GATES,
)
ONE_OF["dense_gate"] = dict(gated_attn_enabled=True), GATES
ONE_OF["output_gate"] = dict(attn_out_gate_enabled=True), GATES


@acts("gates")
def spec_head_gate(w, cfg, i, head, x):
    """Of the normed input of attention: the first GATE_WINDOW dimensions, or all."""
    if not (cfg.sparse_attn_gate_enabled or cfg.gated_attn_enabled or cfg.attn_out_gate_enabled):
        return torch.ones(len(x)).double()
    read = x if cfg.gated_attn_enabled else x[:, : cfg.gate_window]
    z = read @ w[f"blocks.{i}.attn.gate.weight"][head]
    if cfg.sparse_attn_gate_enabled:
        z = z * cfg.sparse_attn_gate_scale
    return z.sigmoid() * (2 if cfg.attn_out_gate_enabled else 1)


@pytest.mark.parametrize(
    "knobs, start",
    [
        (dict(sparse_attn_gate_enabled=True), 0.5),
        (dict(gated_attn_enabled=True, gated_attn_init_std=0.0), 0.5),
        (dict(attn_out_gate_enabled=True), 1.0),
    ],
    ids=("sparse", "dense", "output"),
)
def test_gates_start_open_or_half_open(knobs, start):
    gate = GPT(config(**knobs)).blocks[0].attn.gate
    y, x = torch.randn(2, 5, 4, 8), torch.randn(2, 5, 32)
    assert torch.equal(gate(y, y, x), start * y)


def test_initial_gates_are_drawn_last_and_as_wide_as_they_were_told(run):
    plain = train_gpt.build_model(config(**PLAIN), run, sdpa).state_dict()
    for name, std in (("sparse_attn_gate", 0.3), ("gated_attn", 0.2)):
        knobs = {f"{name}_enabled": True, f"{name}_init_std": std}
        w = train_gpt.build_model(config(**PLAIN, **knobs), run, sdpa).state_dict()
        assert all(w[each].equal(plain[each]) for each in plain)
        drawn = torch.cat([w[each].flatten() for each in sorted(GATES)])
        assert drawn.std().item() == pytest.approx(std, rel=0.2)


# ── skip gates ──
TECHNIQUES["skip_gates"] = (dict(skip_gates_enabled=True), {"skip.gate"})


def spec_skip(w, cfg, visit, x, kept):
    kept = w["skip_weights"][visit] * kept
    if not cfg.skip_gates_enabled:
        return x + kept
    g = w["skip.gate"][visit].sigmoid()
    return g * x + (1 - g) * kept


# ── loops ──
TECHNIQUES["loops"] = (dict(num_loops=1, loop_start=0, loop_end=1), set())


def spec_visits(cfg):
    """Each block as often as it is passed."""
    before, behind = range(cfg.loop_start), range(cfg.loop_end + 1, cfg.num_layers)
    if not cfg.num_loops:
        return [*range(cfg.num_layers)]
    visits = [*before]
    for _ in range(cfg.num_loops + 1):
        visits += range(cfg.loop_start, cfg.loop_end + 1)
    return [*visits, *behind]


def test_the_visits_of_1855():
    """training.md's list: layers 3 to 5 three times, and the U-Net over all 17 visits."""
    with torch.device("meta"):
        model = GPT(config(num_layers=11, num_loops=2, loop_start=3, loop_end=5))
    assert model.order(2) == ([0, 1, 2, 3, 4, 5, 3, 4], [5, 3, 4, 5, 6, 7, 8, 9, 10])
    assert model.order(0) == ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9, 10])
    assert model.skip_weights.shape == (8, 32) and model.loops == 2


@pytest.mark.parametrize("loops", (0, 1, 2))
def test_a_model_with_fewer_loops_on_is_the_model_that_has_only_those(loops):
    knobs = dict(num_layers=5, loop_start=1, loop_end=2, skip_gates_enabled=True)
    most, fewer = make(config(**knobs, num_loops=2)), GPT(config(**knobs, num_loops=loops))
    fewer.load_state_dict(train_gpt.rows_of(most.state_dict(), fewer.state_dict()))
    batch = rows(config())
    before = most(*batch)
    most.loops = loops
    assert torch.equal(most(*batch), fewer(*batch)) and torch.equal(most(*batch), before) == (
        loops == 2
    )


def test_each_number_of_loops_is_compiled_once():
    graphs = []
    torch._dynamo.reset()
    model = make(config(**ALL))
    batch = rows(config())
    compiled = torch.compile(
        model, fullgraph=True, dynamic=False, backend=lambda graph, _: graphs.append(1) or graph
    )
    for loops in (0, 1, 0, 1, 1):
        model.loops = loops
        torch.testing.assert_close(compiled(*batch), model(*batch))
    torch._dynamo.reset()
    assert len(graphs) == 2


# ── lanes ──
TECHNIQUES["lanes"] = (dict(parallel_start_layer=2), {"lanes.post", "lanes.residual"})


def spec_lanes(w, cfg, i, x, x0, ids):
    """(2, T, dim), the lanes of attention and MLP: both read before either writes."""
    _, attention = spec_attention_adds(w, cfg, i, x[0], x0, ids)
    mlp = spec_mlp_adds(w, cfg, i, x[1])
    post, residual = w["lanes.post"][i], w["lanes.residual"][i]
    return torch.stack(
        [
            residual[lane] * x[lane] + post[0, lane] * attention + post[1, lane] * mlp
            for lane in (0, 1)
        ]
    )


def test_lanes_start_as_the_record_starts_them():
    lanes = GPT(config(parallel_start_layer=1)).lanes
    assert (lanes.post == 1).all() and (lanes.residual == 1.1).all()


# ── parallel blocks ──
TECHNIQUES["parallel"] = (dict(parallel_residual_start=1), set())


# ── two softcaps ──
def spec_softcap(w, cfg, z):
    above = below = cfg.logit_softcap
    if cfg.asym_logit_rescale:
        above = cfg.logit_softcap + w["softcap.positive"]
        below = cfg.logit_softcap + w["softcap.negative"]
    return torch.where(z > 0, above * torch.tanh(z / above), below * torch.tanh(z / below))


def test_both_softcaps_start_where_the_one_is_and_learn():
    cfg = config(asym_logit_rescale=True, logit_softcap=3.0)
    model, batch = GPT(cfg), rows(cfg)
    plain = GPT(config(logit_softcap=3.0))
    plain.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(model(*batch), plain(*batch))
    with torch.no_grad():
        model.tok_emb.mul_(100)
    model(*batch).mean().backward()
    assert model.softcap.positive.grad != 0 and model.softcap.negative.grad != 0


# ── LN scale ──
TECHNIQUES["ln_scale"] = (dict(ln_scale=True), set())


@acts("norms")
def spec_ln_scale(cfg, i, x):
    return x * (i + 1) ** -0.5 if cfg.ln_scale else x


def test_ln_scale_is_one_over_the_root_of_the_depth():
    x = torch.randn(2, 32)
    for i, block in enumerate(GPT(config(num_layers=4, ln_scale=True)).blocks):
        torch.testing.assert_close(block.norm(x), (i + 1) ** -0.5 * rms_norm(x))


# ── NTK ──
TECHNIQUES["ntk"] = (dict(rope_ntk_len=12), set())


@acts("base")
def spec_ntk(cfg, dims, base):
    if not cfg.rope_ntk_len:
        return base
    return base * (cfg.train_seq_len / cfg.rope_ntk_len) ** (dims / (dims - 2))


def test_ntk_base_of_975():
    cfg = Config(rope_dims=16, rope_ntk_len=1024, train_seq_len=2048)
    cos, sin = rotary_tables(cfg, torch.float32)
    # at position 1, of the first of each pair: base^(-2k / 16)
    angle = torch.atan2(sin[1, 0], cos[1, 0])[:8].double()
    assert cos.shape[-1] == 16 and angle[0] == pytest.approx(1.0)
    assert angle[1].item() ** -8 == pytest.approx(22082, abs=1) == 10000 * 2 ** (16 / 14)


# ── all of them together ──
ALL = {knob: value for on, _ in TECHNIQUES.values() for knob, value in on.items()}
ALL |= dict(smear_pos="post_norm", smear_mask_bos=True, asym_logit_rescale=True)
OFF = dict(smear_gate=False, sparse_attn_gate_enabled=False)
# All, with what excludes some of them
OTHERS = ALL | OFF | dict(smear_gate_enabled=True, gated_attn_enabled=True)
LOOPS = dict(PLAIN, num_layers=7, num_loops=2, loop_start=1, loop_end=3)


@pytest.mark.parametrize(
    "knobs",
    [
        pytest.param(knobs, id=name)
        for name, knobs in {
            "plain": PLAIN,
            "default": {},
            "all": ALL,
            "others": OTHERS,
            **{name: PLAIN | on for name, (on, _) in {**TECHNIQUES, **ONE_OF}.items()},
            "output_gate_of_all": ALL | OFF | dict(attn_out_gate_enabled=True, gate_window=32),
            "softcaps": dict(asym_logit_rescale=True, logit_softcap=2.0),
            "masked_gated_smear": PLAIN | dict(smear_gate_enabled=True, smear_mask_bos=True),
            "loops": LOOPS,
            "loops_of_all": LOOPS | dict(loop_start=0, loop_end=6, num_loops=1),
            "loop_of_the_last": LOOPS | dict(loop_start=6, loop_end=6, num_loops=3),
            "loops_and_lanes": LOOPS | dict(parallel_start_layer=4, parallel_final_lane="mlp"),
            "parallel_of_all": PLAIN | dict(parallel_residual_start=0),
            "lanes_of_all": PLAIN | dict(num_layers=4, parallel_start_layer=2),
            "lane_of_attention": PLAIN | dict(parallel_start_layer=1, parallel_final_lane="attn"),
            "lanes_of_one": dict(OTHERS, num_layers=4, parallel_start_layer=3, ve_layers="3"),
            "masked_pre_norm": dict(smear_mask_bos=True),
            "one_block": dict(num_layers=1),
            "even_depth": dict(num_layers=2),
            "all_even_depth": dict(ALL, num_layers=4, ve_layers="3"),
            "odd_depth": dict(num_layers=5, num_kv_heads=1),
            "long_rows": dict(ALL, eval_seq_len=40),
            "no_grouping": dict(ALL, num_kv_heads=4),
            "numbers": dict(logit_softcap=2.0, rope_base=50.0, mlp_mult=1.5),
        }.items()
    ],
)
def test_the_model_is_the_specification(knobs):
    cfg = config(**knobs)
    model, (ids, targets) = make(cfg), rows(cfg, length=cfg.window)
    w = {name: p.detach().double() for name, p in model.named_parameters()}
    pairs = zip(ids, targets, strict=True)
    expected = torch.stack([spec_model(w, cfg, row, target) for row, target in pairs])
    torch.testing.assert_close(model(ids, targets).double(), expected, rtol=2e-4, atol=2e-4)


# ── one forward path, causal ──
@pytest.mark.parametrize("knobs", (PLAIN, ALL), ids=("plain", "all"))
def test_gathered_positions_give_the_numbers_of_the_full_path(knobs):
    cfg = config(**knobs)
    model, (ids, targets) = make(cfg), rows(cfg)
    full = model(ids, targets)
    for positions in (torch.tensor([[3, 0, 23, 7], [22, 23, 5, 5]]), torch.tensor([[4], [9]])):
        gathered = model(ids, targets.gather(1, positions), positions)
        torch.testing.assert_close(gathered, full.gather(1, positions), rtol=1e-5, atol=1e-5)
    assert torch.equal(
        model(ids, targets.flip(1), torch.arange(24).flip(0).expand(2, -1)), full.flip(1)
    )


@pytest.mark.parametrize(
    "knobs",
    (PLAIN, ALL, dict(ALL, smear_pos="pre_norm", smear_mask_bos=False)),
    ids=("plain", "all", "pre_norm"),
)
def test_a_token_changes_no_earlier_prediction(knobs):
    cfg = config(**knobs)
    model, (ids, targets) = make(cfg), rows(cfg, 1)
    before = model(ids, targets)
    for t in range(ids.shape[1]):
        other = ids.clone()
        other[0, t] = 2 + (ids[0, t] + 7) % 60
        change = (model(other, targets) - before)[0]
        assert not change[:t].any() and change[t] != 0, t


def test_a_shorter_row_gives_the_same_predictions():
    cfg = config(**ALL, eval_seq_len=40)
    model, (ids, targets) = make(cfg), rows(cfg, 2, 40)
    torch.testing.assert_close(
        model(ids[:, :9], targets[:, :9]), model(ids, targets)[:, :9], rtol=1e-5, atol=1e-5
    )


def test_rows_of_a_batch_do_not_mix():
    cfg = config(**ALL)
    model, (ids, targets) = make(cfg), rows(cfg, 3)
    pairs = zip(ids, targets, strict=True)
    alone = torch.cat([model(row[None], target[None]) for row, target in pairs])
    torch.testing.assert_close(model(ids, targets), alone, rtol=1e-5, atol=1e-5)


# ── off is absent, on is live ──
def test_the_plain_model_has_no_tensor_of_a_technique():
    block = {
        "resid_mix",
        "attn_scale",
        "mlp_scale",
        "attn.q_gain",
        "mlp.fc.weight",
        "mlp.proj.weight",
    } | {f"attn.{name}.weight" for name in ("c_q", "c_k", "c_v", "proj")}
    expected = {"tok_emb", "skip_weights"} | {
        f"blocks.{i}.{name}" for i in range(3) for name in block
    }
    assert GPT(config(**PLAIN)).state_dict().keys() == expected


@pytest.mark.parametrize("name", {**TECHNIQUES, **ONE_OF})
def test_a_technique_adds_its_tensors_only_and_is_live(name):
    knobs, names = {**TECHNIQUES, **ONE_OF}[name]
    off = make(config(**PLAIN))
    on = make(config(**(PLAIN | knobs)))
    assert on.state_dict().keys() - off.state_dict().keys() == names
    assert off.state_dict().keys() <= on.state_dict().keys()
    # of a tensor that has more rows with it, the first
    for same, w in train_gpt.rows_of(on.state_dict(), off.state_dict()).items():
        w.copy_(off.state_dict()[same])
    ids, targets = rows(config())
    assert ((on(ids, targets) - off(ids, targets)).abs() > 1e-4).float().mean() > 0.5


@pytest.mark.parametrize(
    "knobs, expected",
    [
        (dict(num_layers=9, mlp_mult=2, **PLAIN), 17_059_912),
        (dict(), 26_502_232),
        (dict(num_layers=10, smear_pos="post_norm", bigram_vocab_size=10240), 25_517_137),
        (
            dict(
                smear_pos="post_norm",
                bigram_vocab_size=2048,
                ve_enabled=True,
                xsa_last_n=4,
                ln_scale=True,
                rope_dims=16,
                rope_ntk_len=1024,
                negative_slope=0.5,
            ),
            26_993_756,
        ),
        (
            dict(
                vocab_size=8192,
                mlp_mult=4.0,
                smear_gate=False,
                smear_gate_enabled=True,
                skip_gates_enabled=True,
                sparse_attn_gate_enabled=True,
                num_loops=2,
                parallel_start_layer=8,
            ),
            35_945_671,
        ),
    ],
    ids=("145_199", "194", "989", "975", "1855"),
)
def test_parameter_counts_are_those_of_the_scripts(knobs, expected):
    with torch.device("meta"):
        assert sum(p.numel() for p in GPT(Config(init="default", **knobs)).parameters()) == expected


# ── attention ──
def test_query_head_h_reads_kv_head_h_over_ratio():
    v = torch.arange(3.0)[None, None, :, None].expand(1, 4, 3, 8)  # kv head n holds n everywhere
    y = sdpa(torch.randn(1, 4, 6, 8), torch.randn(1, 4, 3, 8), v)
    torch.testing.assert_close(y[0, :, :, 0], torch.tensor([0.0, 0, 1, 1, 2, 2]).expand(4, -1))


# ── ATTN_BACKEND ──
def heads(grad: bool = True) -> list[torch.Tensor]:
    return [
        torch.randn(2, 24, n, 8, generator=torch.Generator().manual_seed(n), requires_grad=grad)
        for n in (4, 2, 2)
    ]


def machine(cuda: bool = False):
    """(run, its log) of one rank without a folder."""
    log = []
    run = SimpleNamespace(
        cuda=cuda,
        world=1,
        rank=0,
        compile=False,
        device=torch.device("cpu"),
        dtype=torch.float32,
        log=log.append,
        broadcast=lambda v: v,
    )
    run.wait = lambda: None
    for name in ("milliseconds", "compiled"):
        setattr(run, name, partial(getattr(Run, name), run))
    return run, log


def install(monkeypatch, module: str, function) -> None:
    functions = SimpleNamespace(flash_attn_func=function, flash_attn_varlen_func=function)
    monkeypatch.setitem(sys.modules, module, functions)


@pytest.mark.parametrize(
    "name, remedy", [("fa3", "hopper"), ("fa2", "pip install flash-attn"), ("cudnn", "choose auto")]
)
def test_a_backend_that_was_asked_for_and_does_not_work_is_refused_with_the_remedy(
    monkeypatch, name, remedy
):
    for module in ("flash_attn_interface", "flash_attn"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(Refusal, match=f"ATTN_BACKEND={name}.*{remedy}") as caught:
        choose_attention(config(attn_backend=name), machine()[0])
    assert caught.value.code == 2


@pytest.mark.parametrize("extra", [False, True])
def test_a_flash_attention_package_is_used_as_sdpa(monkeypatch, extra):
    def flash_attn_func(q, k, v, causal=False):
        assert causal
        return (sdpa(q, k, v), "log-sum-exp") if extra else sdpa(q, k, v)

    install(monkeypatch, "flash_attn_interface", flash_attn_func)
    assert torch.equal(
        choose_attention(config(attn_backend="fa3"), machine()[0])(*heads()), sdpa(*heads())
    )


def test_auto_on_a_gpu_times_all_that_work_and_takes_the_fastest(monkeypatch):
    def slow(q, k, v, causal):
        time.sleep(0.02)
        return sdpa(q, k, v)

    install(monkeypatch, "flash_attn", slow)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    run, log = machine(cuda=True)
    chosen = choose_attention(config(train_batch_tokens=16 * 24), run)
    assert torch.equal(chosen(*heads()), sdpa(*heads()))
    failed, last = "\n".join(log[:-1]), log[-1]
    assert "ATTN_BACKEND=fa3" in failed and "ATTN_BACKEND=cudnn" in failed and "fa2" not in failed
    assert all(f" {name} " in last for name in ("sdpa", "flash", "fa2")) and not last.startswith(
        "attention: fa2"
    )
    assert "ms for 2 rows of 24" in last  # of 16 rows in 8 micro-batches


def test_the_time_of_an_attention_kernel_is_that_of_one_call():
    calls = []
    run = SimpleNamespace(cuda=False, milliseconds=lambda work: (work(), 100.0)[1])
    q = torch.ones(1, requires_grad=True)

    def attend(q, k, v, documents):
        calls.append(documents)
        return q + k + v

    per_call = train_gpt.attention_milliseconds(run, attend, (q, q, q, None))
    assert per_call == 100 / train_gpt.ATTENTION_CALLS and train_gpt.ATTENTION_CALLS > 1
    assert len(calls) == 4 * train_gpt.ATTENTION_CALLS  # the first are not timed


@pytest.mark.parametrize(
    "cost, chosen",
    [
        ({"sdpa": 1.02, "cudnn": 2.0, "flash": 1.0}, "sdpa"),
        ({"sdpa": 1.0, "cudnn": 2.0, "flash": 1.02}, "sdpa"),
        ({"sdpa": 1.04, "cudnn": 1.02, "flash": 1.0}, "cudnn"),
        ({"sdpa": 1.04, "cudnn": 1.04, "flash": 1.0}, "flash"),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_noise_of_the_timing_gives_no_two_runs_different_kernels(monkeypatch, cost, chosen):
    monkeypatch.setattr(train_gpt, "attention_candidates", lambda cfg, run: list(cost))
    monkeypatch.setattr(train_gpt, "attention_function", lambda name: name)
    monkeypatch.setattr(train_gpt, "attention_milliseconds", lambda run, name, given: cost[name])
    run, _ = machine()
    assert choose_attention(config(), run) == run.attention == chosen


def test_whoever_scores_alone_times_kernels_on_windows_whatever_a_step_holds(monkeypatch):
    monkeypatch.setattr(train_gpt, "attention_candidates", lambda cfg, run: ["sdpa", "flash"])
    monkeypatch.setattr(train_gpt, "attention_milliseconds", lambda run, attend, given: 1.0)
    run, log = machine()
    choose_attention(config(eval_only="a", train_batch_tokens=2, eval_batch_seqs=3), run)
    assert "ms for 3 rows of 24" in log[-1]


def test_on_a_cpu_auto_is_sdpa():
    run, log = machine()
    assert torch.equal(choose_attention(config(), run)(*heads()), sdpa(*heads())) and log[
        0
    ].startswith("attention: sdpa")


@pytest.mark.parametrize("name", ["sdpa", "flash"])
def test_a_kernel_that_was_chosen_is_in_the_compiled_graph_too(name):
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    expected = [torch.autograd.grad(sdpa(*(qkv := heads())).square().sum(), qkv)]
    torch._dynamo.reset()
    compiled = torch.compile(attention_function(name), fullgraph=True, backend=keep)
    found = torch.autograd.grad(compiled(*(qkv := heads())).square().sum(), qkv)
    torch._dynamo.reset()
    torch.testing.assert_close(found, expected[0])
    assert len(graphs) == 1 and "scaled_dot_product_attention" in graphs[0].code


def test_activations():
    z = torch.tensor([-2.0, 0.0, 3.0])
    assert train_gpt.relu2(z).tolist() == train_gpt.leaky_relu2(z, 0).tolist() == [0, 0, 9]
    assert train_gpt.leaky_relu2(z, 0.5).tolist() == [1, 0, 9]


@pytest.mark.parametrize("cap", (1.0, 30.0))
def test_the_softcap_bounds_every_logit(cap):
    cfg = config(logit_softcap=cap)
    model, (ids, targets) = make(cfg), rows(cfg)
    with torch.no_grad():
        model.tok_emb.mul_(1e4)
    nats = model(ids, targets)
    assert nats.max() <= 2 * cap + math.log(64) and nats.max() > cap


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_norm_gives_unit_rms_to_an_embedding_of_the_initial_size(dtype):
    # bf16's own epsilon of 0.008 would flatten it
    y = rms_norm((0.005 * torch.randn(4, 512)).to(dtype))
    assert y.dtype == dtype
    torch.testing.assert_close(y.float().square().mean(-1).sqrt(), torch.ones(4), rtol=0.02, atol=0)


# ── rotary embedding ──
def test_rope_tables_do_not_depend_on_the_scored_length():
    (short, _), (long, _) = (
        rotary_tables(config(rope_ntk_len=12, eval_seq_len=n), torch.float32) for n in (8, 96)
    )
    assert len(short) == 24 and len(long) == 96 and torch.equal(short, long[:24])


@pytest.mark.parametrize("dims", (0, 4, 2))
def test_rotated_products_depend_on_the_distance_alone(dims):
    cfg = config(rope_dims=dims)
    cos, sin = rotary_tables(cfg, torch.float32)
    q, k = (apply_rotary(torch.randn(8).expand(1, 24, 1, 8), cos, sin)[0, :, 0] for _ in range(2))
    products = q @ k.T
    for distance in range(1, 23):
        diagonal = products.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)
    assert products[:, 0].std() > 1e-3  # but they do depend on it


def test_partial_rope_leaves_the_other_dimensions_alone():
    x = torch.randn(2, 24, 4, 8)
    y = apply_rotary(x, *rotary_tables(config(rope_dims=4), torch.float32))
    assert torch.equal(y[..., 4:], x[..., 4:]) and torch.equal(y[:, 0], x[:, 0])
    assert (y[:, 1:, :, :4] != x[:, 1:, :, :4]).all()
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))


# ── initial weights and dtypes ──
def test_initial_values(run):
    w = train_gpt.build_model(config(**PLAIN), run, sdpa).state_dict()
    for name, p in w.items():
        kind = name.split(".", 2)[2] if name.startswith("blocks.") else name
        if kind in ("attn.proj.weight", "mlp.proj.weight"):
            assert not p.any(), name
        elif kind in ("attn_scale", "mlp_scale", "skip_weights"):
            assert (p == 1).all(), name
        elif kind == "resid_mix":
            assert (p[0] == 1).all() and not p[1].any()
        elif kind == "attn.q_gain":
            assert (p == 1.5).all()
        elif kind == "tok_emb":
            assert p.std() == pytest.approx(0.005, rel=0.1)
        else:
            gram, identity = orthonormal(p)
            torch.testing.assert_close(gram, identity, rtol=0, atol=1e-5, msg=name)


def test_default_init_is_that_of_a_torch_linear():
    model = GPT(config(init="default", model_dim=64))
    for block in model.blocks:
        # U(+-1 / sqrt(columns))
        for layer in (block.attn.c_q, block.attn.c_k, block.attn.c_v, block.mlp.fc):
            assert 0.95 / 8 < layer.weight.abs().max() <= 1 / 8
            assert layer.weight.std().item() == pytest.approx(1 / 8 / 3**0.5, rel=0.05)
        assert not block.attn.proj.weight.any() and not block.mlp.proj.weight.any()


def test_every_parameter_has_its_own_memory():
    params = list(GPT(config(**ALL)).parameters())
    assert len({p.data_ptr() for p in params}) == len(params)


def test_the_seed_determines_the_weights(run):
    cfg = config(**ALL)
    a, b, c = (train_gpt.build_model(config(**ALL, seed=seed), run, sdpa) for seed in (3, 3, 4))
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)
    assert not torch.equal(a.tok_emb, c.tok_emb)
    assert not torch.equal(a.blocks[0].mlp.fc.weight, c.blocks[0].mlp.fc.weight)
    assert cfg.digest() == config(**ALL, seed=4).digest()


@pytest.mark.parametrize("knobs", (PLAIN, ALL), ids=("plain", "all"))
def test_bf16_activations_follow_fp32_and_gradients_stay_fp32(knobs):
    cfg = config(**knobs)
    exact, low, batch = make(cfg), make(cfg, torch.bfloat16), rows(config())
    low.load_state_dict(exact.state_dict())
    assert low.hidden(batch[0]).dtype == torch.bfloat16 and low(*batch).dtype == torch.float32
    for model in (exact, low):
        model(*batch).mean().backward()
    torch.testing.assert_close(low(*batch), exact(*batch), rtol=0.1, atol=0.2)
    for (name, p), q in zip(low.named_parameters(), exact.parameters(), strict=True):
        assert p.dtype == p.grad.dtype == torch.float32
        assert F.cosine_similarity(p.grad.flatten(), q.grad.flatten(), dim=0) > 0.95, name
