"""Document masks: attention that stays inside a document is that of the document by itself.

Would have caught: a mask that training has and scoring has not (#1530's windows before), documents
beyond the last slot of cu_seqlens that attend to each other, a cut that is counted from the row's
start, a graph for every number of documents.
"""

import itertools
import math
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_model import config, machine, make, rows
from test_optimiser import make_trainer
from test_score import documents, setting, validation  # noqa: F401
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode

import train_gpt
from train_gpt import (
    BOS,
    GPT,
    LEAST_SLOTS,
    Attend,
    Refusal,
    Run,
    ScoreSheet,
    choose_attention,
    document_pieces,
    document_windows,
    flash_attention,
    pack,
    sdpa,
    windows,
)


# ── stand-ins for FlashAttention's function for packed pieces ──
def piece_by_piece(q, k, v, bounds, same_bounds, longest, same_longest):
    """Each piece by itself: (tokens, heads, d), bounds (slots + 1,)."""
    assert bounds is same_bounds and longest == same_longest and bounds.dtype == torch.int32
    found = []
    for a, b in itertools.pairwise(bounds.tolist()):
        assert b - a <= longest
        if b > a:
            found.append(sdpa(q[None, a:b], k[None, a:b], v[None, a:b])[0])
    return torch.cat(found)


def all_at_once(q, k, v, bounds, *_):
    """The same in fixed shapes, for what compiles."""
    index = torch.arange(len(q))
    piece = torch.searchsorted(bounds, index.int(), right=True)
    seen = (piece[:, None] == piece) & (index[:, None] >= index)
    mask = torch.zeros(()).where(seen, -math.inf)[None, None]
    return sdpa.kernel(q[None], k[None], v[None], mask)


def packed(varlen) -> Attend:
    return Attend(partial(flash_attention, plain=sdpa, varlen=varlen), pack)


def heads(n: int, time: int, seed: int = 0) -> list[torch.Tensor]:
    """q with 4 heads, k and v with 2, fp64."""
    generator = torch.Generator().manual_seed(seed)
    make_one = partial(torch.randn, dtype=torch.float64, generator=generator, requires_grad=True)
    return [make_one(n, time, count, 8) for count in (4, 2, 2)]


def random_ids(n: int, time: int, often: float = 0.1, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 64, (n, time), generator=generator)
    return ids.masked_fill(torch.rand(n, time, generator=generator) < often, BOS)


def bounds_of(row: list[int], longest: int) -> list[int]:
    """Where the pieces of a row begin, and its end."""
    found = []
    for t, token in enumerate(row):
        if t == 0 or token == BOS or (longest and t - found[-1] == longest):
            found.append(t)
    return [*found, len(row)]


def by_itself(ids: torch.Tensor, longest: int, q, k, v) -> torch.Tensor:
    """Plain attention of each piece."""
    found = []
    for i, row in enumerate(ids.tolist()):
        for a, b in itertools.pairwise(bounds_of(row, longest)):
            found.append(sdpa(q[i : i + 1, a:b], k[i : i + 1, a:b], v[i : i + 1, a:b])[0])
    return torch.cat(found).view(q.shape)


# ── pieces ──
@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(0, 45))
def test_a_piece_begins_at_a_row_a_bos_and_after_the_longest(row, longest):
    first, most, _ = document_pieces(torch.tensor([row]), longest)
    bounds = bounds_of(row, longest)
    expected = [a for a, b in itertools.pairwise(bounds) for _ in range(a, b)]
    assert first[0].tolist() == expected
    assert most >= max(b - a for a, b in itertools.pairwise(bounds))


# Rows of 48: whole masks; with cuts of 1, 6, 7 and 16 the band of two chunks, 7 not dividing them
@pytest.mark.parametrize("longest", (0, 1, 6, 7, 16, 20, 48, 100))
@pytest.mark.parametrize("attend", (sdpa, packed(piece_by_piece)), ids=("mask", "packed"))
def test_masked_attention_is_that_of_each_piece_by_itself(attend, longest):
    ids = random_ids(3, 48)
    tensors = heads(3, 48)
    weight = torch.randn(3, 48, 4, 8, dtype=torch.float64)
    expected = by_itself(ids, longest, *tensors)
    found = attend(*tensors, attend.prepare(document_pieces(ids, longest), torch.float64))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    there = torch.autograd.grad((found * weight).sum(), tensors)
    torch.testing.assert_close(
        there, torch.autograd.grad((expected * weight).sum(), tensors), rtol=1e-11, atol=1e-11
    )
    assert not torch.allclose(expected, sdpa(*tensors))


@pytest.mark.parametrize(
    "time, longest, shape",
    [
        (96, 8, (12, 1, 8, 16)),
        (100, 8, (13, 1, 8, 16)),  # the last chunk is of 4
        (96, 0, (1, 1, 96, 96)),
        (96, 48, (1, 1, 96, 96)),  # a band would be as large
        (97, 48, (1, 1, 97, 97)),
    ],
)
def test_a_long_row_of_short_pieces_costs_a_band_of_two_chunks(time, longest, shape):
    mask = sdpa.prepare(document_pieces(random_ids(1, time), longest), torch.float32)
    assert mask.shape == shape
    assert mask.isfinite().any(-1).all()  # softmax of nothing is NaN


@pytest.mark.parametrize(
    "spelling, given, repeated",
    [
        ("is_causal=False, return_aux=None", dict(is_causal=True), True),  # torch 2.10
        ("*, window_size=(-1, -1)", dict(window_size=(-1, 0)), True),
        (
            "*, window_size=(-1, -1), enable_gqa=False",
            dict(window_size=(-1, 0), enable_gqa=True),
            False,
        ),
    ],
    ids=("2.10", "2.11", "2.12"),
)
def test_each_spelling_of_the_flash_kernel_of_torch_is_understood(
    monkeypatch, spelling, given, repeated
):
    seen = {}
    there = dict(piece_by_piece=piece_by_piece, seen=seen)
    exec(  # a function of exactly these parameters
        f"def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, {spelling}):\n"
        "    seen.update(locals())\n"
        "    return piece_by_piece(q, k, v, cu_q, cu_k, max_q, max_k)",
        there,
    )
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", SimpleNamespace(**there))
    attend = train_gpt.attention_function("flash")
    ids = random_ids(2, 30)
    tensors = heads(2, 30)
    found = attend(*tensors, attend.prepare(document_pieces(ids, 0), torch.float64))
    torch.testing.assert_close(found, by_itself(ids, 0, *tensors))
    assert {name: seen[name] for name in given} == given
    assert seen["k"].shape[1] == (4 if repeated else 2)


# ── slots ──
@pytest.mark.parametrize("more", (0, 1))
def test_more_documents_than_slots_give_nan_and_never_attention_between_them(more):
    time = 2 * LEAST_SLOTS
    slots = LEAST_SLOTS + 1 + 1  # for one row, which is one longest piece
    ids = torch.full((1, time), 7)
    ids[0, : slots + more] = BOS
    tensors = heads(1, time)
    attend = packed(piece_by_piece)
    prepared = attend.prepare(document_pieces(ids, 0), torch.float64)
    assert len(prepared.bounds) == slots + 1 and bool(prepared.overflow) == bool(more)
    if more:
        attend = packed(lambda q, k, v, *_: q * 1.0)  # reads bounds that end before the last token
        assert attend(*tensors, prepared).isnan().all()
    else:
        torch.testing.assert_close(attend(*tensors, prepared), by_itself(ids, 0, *tensors))


# ── the model ──
@pytest.mark.parametrize("longest", (0, 6))
@pytest.mark.parametrize("attend", (sdpa, packed(all_at_once)), ids=("mask", "packed"))
def test_documents_of_a_row_are_predicted_as_by_themselves(attend, longest):
    cfg = config(doc_mask=True, doc_max_len=longest, smear_gate=False, xsa_last_n=1)
    model = GPT(cfg, attend=attend)
    model.load_state_dict(make(cfg).state_dict())
    ids, targets = rows(cfg)
    nats = model(ids, targets)
    for i, row in enumerate(ids.tolist()):
        for a, b in itertools.pairwise(bounds_of(row, longest)):
            alone = model(ids[i : i + 1, a:b], targets[i : i + 1, a:b])
            torch.testing.assert_close(nats[i : i + 1, a:b], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attend", (sdpa, packed(all_at_once)), ids=("mask", "packed"))
def test_one_graph_serves_any_documents(attend):
    model = GPT(config(doc_mask=True, num_layers=1), attend=attend)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    for often in (0.0, 0.1, 1.0):
        ids = random_ids(2, 24, often)
        torch.testing.assert_close(compiled(ids, ids), model(ids, ids))
    assert counter.frame_count == 1
    # a schedule of lengths: one graph for each, and none anew
    for longest in (8, 12, 8, 0):
        model.longest_piece = longest
        torch.testing.assert_close(compiled(ids, ids), model(ids, ids))
    torch._dynamo.reset()
    assert counter.frame_count == 3


# ── scores ──
def test_short_documents_are_scored_in_sliding_windows_as_by_themselves(setting):  # noqa: F811
    """In windows of 64, stride 16: those of at most 49 tokens, to the last bit that rounding has;
    longer ones in other windows.
    """
    cfg = setting(doc_mask=True, smear_gate=False, bigram_vocab_size=0)
    run = Run(cfg)
    val = validation(cfg, run)
    model = make(cfg)
    assert model.longest_piece == 0
    sliding, alone = (
        ScoreSheet(cfg, run, val, len(where)).fill(model, where).nats[:-1]
        for where in (windows(0, val.n, 64, 16), document_windows(val, 64, 16))
    )
    begins = [*torch.where(val.tokens[: val.n] == BOS)[0].tolist(), val.n]
    alike = {
        (b - a <= 49, torch.allclose(sliding[a:b], alone[a:b], rtol=1e-4, atol=1e-4))
        for a, b in itertools.pairwise(begins)
    }
    assert (True, True) in alike and (False, False) in alike and (True, False) not in alike


def test_what_fills_up_a_window_is_no_document(tiny):
    """The window reads one token, a BOS, and is padded to 64."""
    cfg = tiny(doc_mask=True)
    run = Run(cfg)
    val = validation(cfg, run)
    begin = torch.where(val.tokens == BOS)[0][1].item()
    seen = []

    def forward(ids, targets, positions):
        seen.append(ids)
        return torch.zeros(targets.shape)

    ScoreSheet(cfg, run, val, 1).fill(forward, np.array([[begin, begin + 1, begin]]))
    assert seen[0].shape == (1, 64) and (seen[0] == BOS).sum() == 1


# ── training ──
def test_packed_documents_train_in_pieces_of_a_row_and_are_scored_whole(tiny, monkeypatch):
    """LOADER=documents: a step is one row of 512 tokens, and TRAIN_SEQ_LEN the longest piece."""
    seen = []

    def spy(ids, longest, *most):
        seen.append((ids.shape[1], longest))
        return document_pieces(ids, longest, *most)

    monkeypatch.setattr(train_gpt, "document_pieces", spy)
    cfg = tiny(loader="documents", doc_mask=True, val_loss_every=3)
    report = train_gpt.main(cfg)
    assert report["exit_code"] == 0 and report["inactive"] == []
    assert report["toggles"]["DOC_MASK"]["effect"] != 0
    # a kernel is tried; steps, also those whose cost is measured; fixed and sliding windows
    assert {*seen} == {(16, 64), (512, 64), (64, 0)}


@pytest.mark.parametrize(
    "knobs, longest",
    [
        ({}, 0),
        (dict(doc_max_len=24), 24),
        (dict(loader="documents"), 32),
        (dict(loader="documents", doc_max_len=24), 24),
        (dict(loader="documents", train_seq_schedule="32@0.5,64@1", train_seq_len=64), 32),
        # scoring cuts at 64, and the steps where the schedule says
        (
            dict(
                loader="documents",
                train_seq_schedule="32@0.5,64@1",
                train_seq_len=64,
                doc_max_len=64,
            ),
            32,
        ),
    ],
    ids=str,
)
def test_a_step_cuts_documents_at_doc_max_len_or_at_its_own_length(knobs, longest):
    batch = dict(train_batch_tokens=8 * 24 * 8)
    assert config(doc_mask=True, **batch | knobs).longest_piece(32) == longest


def test_a_step_with_more_documents_than_slots_ends_the_run_with_the_remedy(tiny, monkeypatch):
    """On a row of 512 tokens, half of them a BOS, with room for 4 documents and 8 cuts."""
    monkeypatch.setattr(train_gpt, "LEAST_SLOTS", 4)
    attend = packed(all_at_once)
    trainer = make_trainer(tiny(doc_mask=True, loader="documents"), attend)
    ids = torch.full((1, 512), 7)
    ids[0, ::2] = BOS
    now = train_gpt.StepPlan(1.0, 0.9, length=64)
    with pytest.raises(Refusal, match=r"not finite.*ATTN_BACKEND=sdpa.*than slots") as end:
        trainer.step((ids, ids), now)
    assert end.value.code == 5
    ids[0, 2:] = 7
    trainer.step((ids, ids), now)
    assert math.isfinite(trainer.loss)


@pytest.mark.parametrize("doc_mask, often", [(True, 2), (True, 64), (False, 2)])
def test_scores_of_more_documents_than_slots_end_with_the_remedy_too(
    tiny, monkeypatch, doc_mask, often
):
    """Also where nothing was trained: half of the tokens are a BOS, or one in 64."""
    monkeypatch.setattr(train_gpt, "LEAST_SLOTS", 4)
    cfg = tiny(doc_mask=doc_mask)
    run = Run(cfg)
    val = validation(cfg, run)
    val.tokens[::often] = BOS
    attend = packed(all_at_once)
    state = train_gpt.build_model(cfg, run, attend).state_dict()
    score = partial(train_gpt.score_all, cfg, run, state, val, attend, None)
    if doc_mask and often == 2:
        with pytest.raises(Refusal, match=r"not finite.*ATTN_BACKEND=sdpa: .*than slots") as end:
            score()
        assert end.value.code == 5
    else:
        score()


def test_where_the_model_runs_eagerly_on_a_gpu_flex_is_compiled_by_itself(monkeypatch):
    """Else it makes scores of all pairs of tokens."""
    name = "torch.nn.attention.flex_attention"
    calls = []

    def attention(q, *_, **__):
        calls.append("plain")
        return q

    def compiled(function, **_):
        return lambda *a, **k: calls.append("compiled") or function(*a, **k)

    blocks = SimpleNamespace(from_kv_blocks=lambda *_, **__: None)
    there = SimpleNamespace(flex_attention=attention, BlockMask=blocks)
    monkeypatch.setitem(sys.modules, name, there)
    monkeypatch.setattr(torch, "compile", compiled)
    attend = train_gpt.attention_function("flex")
    with FakeTensorMode():
        for device in ("cpu", "cuda"):
            attend(*torch.empty(3, 1, 8, 2, 16, device=device), "blocks")
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        attend(*torch.empty(3, 1, 8, 2, 16, device="cuda"), "blocks")
    assert calls == ["plain", "compiled", "plain", "plain"]


def test_on_a_gpu_auto_tries_what_knows_of_documents(monkeypatch):
    for module in ("flash_attn_interface", "flash_attn"):
        monkeypatch.setitem(sys.modules, module, None)
    run, log = machine(cuda=True)
    cfg = config(doc_mask=True, doc_max_len=4, train_batch_tokens=16 * 24)
    attend = choose_attention(cfg, run)
    assert run.attention == "sdpa" and attend.prepare is sdpa.prepare
    # none of these works on a CPU
    tried = [
        name for name in ("flash", "flex", "fa3", "fa2") if f"ATTN_BACKEND={name}:" in str(log)
    ]
    assert tried == ["flash", "fa3", "fa2"]
