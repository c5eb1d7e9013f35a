"""Scoring: which targets, in which context, by whom, and in which order.

Would have caught: tail targets scored 16 to 32 times (#50, #989, #194, #975); document windows that
ran on into the next documents and scored 21 % of their targets twice (#145, #199); a deadlock when
a chunk's rows do not divide among the ranks (#975); test-time training that scores what it has
already learned (#568, #677); a wrong denominator (#2071).
"""

import itertools
import json
import math
import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
import torch
from conftest import THREADS, until, write_shard
from hypothesis import given, settings
from hypothesis import strategies as st
from launch import free_port, serve
from roles import draw

import train_gpt
from train_gpt import (
    BOS,
    NgramTilt,
    Refusal,
    Run,
    Score,
    ScoreSheet,
    Split,
    Validation,
    build_model,
    document_windows,
    ngram_hints,
    score,
    sdpa,
    windows,
)

SENTENCES = (
    17,
    90,
    260,
    5,
    140,
    40,
    330,
    64,
    200,
    11,
    450,
    75,
    30,
    180,
    120,
    55,
)  # characters per document


def short_documents(data: Path, folder: Path) -> Path:
    """The training shard and tokenizer of `data` with a validation
    shard of many documents shorter than a window.
    """
    from pydoc_data.topics import topics

    text = " ".join(" ".join(topics[name].split()) for name in sorted(topics)[:8])
    sp = sentencepiece.SentencePieceProcessor(model_file=str(data / "tokenizer.model"))
    cuts = np.cumsum((0, *SENTENCES))
    folder.mkdir()
    documents = [[1, *sp.encode(text[a:b].strip())] for a, b in itertools.pairwise(cuts)]
    write_shard(folder / "fineweb_val_000000.bin", np.concatenate(documents))
    for name in ("tokenizer.model", "fineweb_train_000000.bin"):
        (folder / name).symlink_to(data / name)
    return folder


@pytest.fixture(scope="session")
def documents(data, tmp_path_factory) -> Path:
    return short_documents(data, tmp_path_factory.mktemp("documents") / "data")


MODES = {
    "fixed": dict(eval_stride=0),
    "sliding": dict(eval_stride=16),
    "documents": dict(eval_stride=16, doc_isolated_eval=True),
    "ttt": dict(
        eval_stride=16,
        ttt_mode="sgd",
        ttt_chunk_tokens=128,
        ttt_lr=0.5,
        ttt_epochs=2,
        ttt_freeze_blocks=1,
    ),
    # without a warm A, as a document then learns nothing from those that stand behind it
    "lora": dict(
        ttt_mode="lora",
        ttt_batch_size=3,
        ttt_chunk_size=16,
        ttt_lora_rank=2,
        ttt_lora_lr=0.01,
        ttt_warm_start_a=False,
    ),
}


PHASED = MODES["lora"] | dict(
    ttt_warm_start_a=True,
    phased_ttt_enabled=True,
    phased_ttt_prefix_docs=9,
    phased_ttt_num_phases=2,
    global_ttt_lr=0.5,
    global_ttt_chunk_tokens=64,
)

TILT = dict(ngram_tilt_enabled=True, token_order=3, token_threshold=0.5, token_boost=1.5)


@pytest.fixture
def setting(tiny, documents):
    """setting(**knobs) -> a Config that scores the short documents,
    of a model in which context matters a lot.
    """
    usual = dict(
        data_path=str(documents),
        val_max_tokens=700,
        bigram_vocab_size=64,
        bigram_dim=16,
        eval_batch_seqs=4,
    )
    return lambda **knobs: tiny(**usual | knobs)


def validation(cfg, run) -> Validation:
    return Validation(cfg, run, Split(cfg, "val"))


def lively_model(cfg, run):
    """Every parameter random, also those that start at zero:
    each target depends on all that it can see.
    """
    model = build_model(cfg, run, sdpa)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.15 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("world, told", [(1, [4, 8, 10, 14, 18, 20]), (2, [8, 10, 18, 20])])
def test_the_live_line_counts_the_windows_of_all_ranks(tiny, monkeypatch, world, told):
    """10 windows of one shape in 3 batches, twice: the numbers of batches of the ranks differ."""
    cfg = tiny(eval_batch_seqs=4)
    run = Run(cfg)
    monkeypatch.setattr(run, "world", world)
    said = []
    monkeypatch.setattr(run, "at_work", said.append)
    val = validation(cfg, run)
    rows = windows(0, 20 * cfg.window, cfg.window, 0)
    sheet = ScoreSheet(cfg, run, val, len(rows))

    def forward(ids, targets, positions):
        return torch.zeros(targets.shape)

    sheet.fill(forward, rows[:10]).fill(forward, rows[10:])
    assert [int(line.split()[0]) for line in said] == told
    assert all(" of 20 windows, " in line for line in said)


def rows_of(cfg, val, mode: str) -> np.ndarray:
    if mode == "documents":
        return document_windows(val, cfg.window, cfg.eval_stride)
    return windows(0, val.n, cfg.window, cfg.eval_stride)


def nats_of(cfg, run, val, model, mode: str) -> tuple[torch.Tensor, Score]:
    """(nats of every target, Score), by the functions that the pipeline calls.

    Test-time training changes the model.
    """
    sheets = []
    with pytest.MonkeyPatch.context() as patch:
        total = ScoreSheet.total
        patch.setattr(ScoreSheet, "total", lambda sheet: (sheets.append(sheet), total(sheet))[1])
        work = train_gpt.scoring_work(cfg, run, model, model)
        mode = "ttt" if mode == "lora" else mode
        found = work.get(mode, partial(score, cfg, run, model))(val)
    return sheets[0].nats[:-1].clone(), found


def one_by_one(model, val, rows) -> torch.Tensor:
    """The same nats, one window at a time, all logits computed, no padding."""
    nats = torch.full((val.n,), math.nan)
    with torch.no_grad():
        for start, end, first in rows.tolist():
            ids, targets = val.tokens[start:end].long(), val.tokens[start + 1 : end + 1].long()
            nats[first:end] = model(ids[None], targets[None])[0, first - start :]
    return nats


# ── windows ───────────────────────────────────────────────────────────────────────────────────────
spans = dict(
    low=st.integers(0, 50), n=st.integers(0, 300), length=st.integers(1, 400), part=st.floats(0, 1)
)


@settings(max_examples=400, deadline=None)
@given(**spans)
def test_windows_cover_each_target_once_within_the_length_and_never_read_past_it(
    low, n, length, part
):
    rows, high = windows(low, low + n, length, int(part * length)), low + n
    assert np.concatenate(
        [np.arange(first, end) for _, end, first in rows] or [[]]
    ).tolist() == list(range(low, high))
    assert all(
        low <= start <= first < end <= min(start + length, high) for start, end, first in rows
    )


@settings(max_examples=200, deadline=None)
@given(**spans)
def test_every_sliding_window_but_the_first_has_full_context(low, n, length, part):
    for start, end, _ in windows(low, low + n, length, max(1, int(part * length)))[1:]:
        assert end - start == length


@settings(max_examples=200, deadline=None)
@given(**spans)
def test_stride_0_windows_are_disjoint_and_a_stride_of_the_length_scores_the_same_spans(
    low, n, length, part
):
    fixed, sliding = (windows(low, low + n, length, stride) for stride in (0, length))
    assert (fixed[:, 0] == fixed[:, 2]).all() and (fixed[1:, 0] == fixed[:-1, 1]).all()
    assert fixed[:, 1:].tolist() == sliding[:, 1:].tolist()


def text_with_documents(n: int, starts) -> SimpleNamespace:
    """n targets whose documents open at these tokens."""
    tokens = torch.zeros(n + 1, dtype=torch.int32)
    tokens[[start for start in starts if start <= n]] = BOS
    return SimpleNamespace(n=n, tokens=tokens, tilt=None)


@settings(max_examples=300, deadline=None)
@given(
    n=st.integers(1, 300),
    starts=st.sets(st.integers(0, 300), max_size=12),
    length=st.integers(1, 80),
    part=st.floats(0, 1),
)
def test_document_windows_cover_the_same_targets_and_never_cross_a_document_start(
    n, starts, length, part
):
    val = text_with_documents(n, starts)
    rows = document_windows(val, length, int(part * length))
    assert np.concatenate([np.arange(first, end) for _, end, first in rows]).tolist() == list(
        range(n)
    )
    for (
        start,
        end,
        _,
    ) in (
        rows
    ):  # the window reads tokens [start, end); a document start may only be the first of them
        assert not any(start < s < end for s in starts)


@settings(max_examples=200, deadline=None)
@given(
    n=st.integers(1, 500),
    part=st.floats(0, 1),
    size=st.integers(1, 9),
    world=st.integers(1, 5),
    compiled=st.booleans(),
    isolated=st.booleans(),
)
def test_every_window_goes_to_exactly_one_rank_and_fits_its_batch(
    n, part, size, world, compiled, isolated
):
    stride = int(part * 64)
    val = text_with_documents(n, range(0, n, 37))
    rows = document_windows(val, 64, stride) if isolated else windows(0, n, 64, stride)
    cfg, dealt, shapes = (
        SimpleNamespace(eval_batch_seqs=size, eval_stride=stride, window=64),
        [],
        set(),
    )
    for rank in range(world):
        run = SimpleNamespace(
            rank=rank, world=world, compile=compiled, device=torch.device("cpu"), tick=lambda: 0.0
        )
        for batch, tokens, slots in ScoreSheet(cfg, run, val, len(rows)).batches(rows):
            real = batch[batch[:, 2] < batch[:, 1]]
            assert (real[:, 1] - real[:, 0] <= tokens).all() and (
                real[:, 1] - real[:, 2] <= (slots or tokens)
            ).all()
            assert (
                slots or (batch[:, 2] == batch[:, 0]).logical_or(batch[:, 2] == batch[:, 1]).all()
            )  # None: all of the row
            assert len(batch) <= size
            shapes.add((len(batch), tokens, slots))
            dealt += real.tolist()
    assert sorted(dealt) == sorted(rows.tolist())
    assert not compiled or len(shapes) <= 2  # a new shape is a recompile


# ── scores ────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("compiled_shapes", [False, True])
@pytest.mark.parametrize("mode", ["fixed", "sliding", "documents"])
def test_batched_scores_equal_one_window_at_a_time(setting, mode, compiled_shapes):
    cfg = setting(**MODES[mode])
    run = Run(cfg)
    val, model = validation(cfg, run), lively_model(cfg, run)
    expected = one_by_one(model, val, rows_of(cfg, val, mode))
    run.compile = compiled_shapes
    nats, found = nats_of(cfg, run, val, model, mode)
    torch.testing.assert_close(nats, expected, rtol=1e-5, atol=1e-5)
    bpb = expected.double().sum().item() / math.log(2) / val.target_bytes.sum().item()
    assert found.bpb == pytest.approx(bpb, rel=1e-6) and found.targets == val.n == 700
    # what is computed behind a window's end is in no block
    assert sum(found.blocks) == pytest.approx(found.loss * val.n, rel=1e-9)


def test_each_mode_scores_the_same_targets_and_bytes_but_in_other_contexts(setting):
    counts, bits = set(), set()
    for mode, knobs in MODES.items():
        cfg = setting(**knobs)
        run = Run(cfg)
        val = validation(cfg, run)
        _, found = nats_of(cfg, run, val, lively_model(cfg, run), mode)
        counts.add((found.targets, found.bytes))
        bits.add(round(found.bpb, 4))
    assert len(counts) == 1 and len(bits) == len(MODES)


@pytest.mark.parametrize("mode", MODES)
def test_a_model_of_uniform_logits_scores_log2_of_the_vocabulary_per_target(setting, mode):
    cfg = setting(**MODES[mode], bigram_vocab_size=0)
    run = Run(cfg)
    val, model = validation(cfg, run), lively_model(cfg, run)
    with torch.no_grad():
        model.tok_emb.zero_()
    found = nats_of(cfg, run, val, model, mode)[1]
    assert found.bpb == pytest.approx(
        math.log2(384) * val.n / val.target_bytes.sum().item(), rel=1e-7
    )
    assert found.loss == pytest.approx(math.log(384), rel=1e-7)


@pytest.mark.parametrize("mode", MODES)
def test_the_score_does_not_depend_on_the_batch_size(setting, mode):
    cfg = setting(**MODES[mode])
    run = Run(cfg)
    val, model = validation(cfg, run), lively_model(cfg, run)

    def bpb(**sizes: int) -> float:
        untouched = build_model(cfg, run, sdpa)
        untouched.load_state_dict(model.state_dict())
        return nats_of(setting(**MODES[mode], **sizes), run, val, untouched, mode)[1].bpb

    sizes = [bpb(eval_batch_seqs=size) for size in (1, 3, 64)]
    assert sizes == pytest.approx([sizes[0]] * 3, rel=1e-6)
    # that of the steps is another
    assert (abs(bpb(ttt_batch_seqs=1) / sizes[0] - 1) > 1e-4) == (mode == "ttt")


def test_a_target_scored_twice_or_never_is_an_error(setting):
    cfg = setting(eval_stride=16)
    run = Run(cfg)
    val, model = validation(cfg, run), lively_model(cfg, run)
    rows = windows(0, val.n, 64, 16)
    for wrong in (np.concatenate((rows, rows[3:4])), np.delete(rows, 3, axis=0)):
        with pytest.raises(RuntimeError, match="never or twice"):
            score(cfg, run, model, val, wrong)


# ── test-time training ────────────────────────────────────────────────────────────────────────────
@pytest.fixture
def learner(setting):
    """learner(**knobs) -> (cfg, run, validation, a fresh model) with test-time training on."""

    def make(**knobs):
        cfg = setting(**{**MODES["ttt"], **knobs})
        run = Run(cfg)
        return cfg, run, validation(cfg, run), lively_model(cfg, run)

    return make


def weights(model) -> dict:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# 48: windows that reach over the end of their chunk
@pytest.mark.parametrize(
    "stride, momentum, clip", [(0, 0.9, 1.0), (16, 0.9, math.inf), (48, 0.5, 0.1)]
)
def test_test_time_training_equals_a_plain_loop_that_scores_then_learns(
    learner, stride, momentum, clip
):
    knobs = dict(ttt_momentum=momentum, ttt_grad_clip=clip if math.isfinite(clip) else 0.0)
    cfg, run, val, model = learner(eval_stride=stride, **knobs)
    nats, _ = nats_of(cfg, run, val, model, "ttt")
    reference = lively_model(cfg, run)
    frozen = set(reference.blocks[0].parameters())
    params = [p for p in reference.parameters() if p not in frozen]
    rows, expected = windows(0, val.n, 64, stride), torch.zeros(val.n)
    optimiser, chunks = torch.optim.SGD(params, lr=1.0, momentum=momentum), range(0, val.n, 128)
    for c in chunks:
        for row in rows[(c <= rows[:, 2]) & (rows[:, 2] < c + 128)]:
            expected[row[2] : row[1]] = one_by_one(reference, val, row[None])[row[2] : row[1]]
        optimiser.param_groups[0]["lr"] = 0.5 * (1 + math.cos(math.pi * c / chunks[-1])) / 2
        for _ in range(2 if c != chunks[-1] else 0):
            optimiser.zero_grad()
            x, y = (val.tokens[c + i : c + i + 128].long().view(2, 64) for i in (0, 1))
            reference(x, y).mean().backward()
            torch.nn.utils.clip_grad_norm_(params, clip)
            optimiser.step()
    torch.testing.assert_close(nats, expected, rtol=1e-4, atol=1e-4)


def test_the_last_chunk_and_the_frozen_blocks_are_not_trained(learner):
    cfg, run, val, model = learner(val_max_tokens=300)
    before = weights(model)
    nats_of(cfg, run, val, model, "ttt")
    after = weights(model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if not name.startswith("blocks.0.")}
    # no gradient for what does not move, and the model can be trained as before
    assert {name for name, p in model.named_parameters() if p.grad is not None} == moved
    assert all(p.requires_grad for p in model.parameters())
    cfg, run, other, model = learner(val_max_tokens=300)
    other.tokens[257:] = (
        7  # token 256 is the last target of the second chunk, the last one that is learned
    )
    nats_of(cfg, run, other, model, "ttt")
    assert all(torch.equal(after[name], w) for name, w in weights(model).items())


def test_one_chunk_leaves_the_weights_alone(learner):
    cfg, run, val, model = learner(val_max_tokens=128)
    before = weights(model)
    nats_of(cfg, run, val, model, "ttt")
    assert all(torch.equal(before[name], w) for name, w in weights(model).items())


def test_a_chunk_of_part_windows_is_refused(setting):
    with pytest.raises(Refusal, match="TTT_CHUNK_TOKENS"):
        setting(**MODES["ttt"] | dict(ttt_chunk_tokens=100))


# ── test-time training of adapters (their numbers: test_lora.py) ──────────────────────────────────
@pytest.mark.parametrize("compiled_shapes", [False, True])
def test_adapters_that_learn_nothing_score_documents_by_themselves(setting, compiled_shapes):
    cfg = setting(**MODES["lora"] | dict(ttt_lora_lr=0.0))
    run = Run(cfg)
    val, model = validation(cfg, run), lively_model(cfg, run)
    expected = one_by_one(model, val, document_windows(val, cfg.window, cfg.ttt_chunk_size))
    run.compile = compiled_shapes
    nats, _ = nats_of(cfg, run, val, model, "lora")
    torch.testing.assert_close(nats, expected, rtol=1e-5, atol=1e-5)


def test_rows_that_are_filled_up_teach_nothing(setting):
    cfg = setting(**MODES["lora"], ttt_short_score_first_steps="40:4")
    run = Run(cfg)
    val, model = validation(cfg, run), lively_model(cfg, run)
    shapes = set()
    forward = model.forward

    def watched(ids, targets, positions, adapters):
        shapes.add((ids.shape, targets.shape, adapters["head"].a.shape))
        return forward(ids, targets, positions, adapters)

    model.forward = watched
    found = []
    for compiled_shapes in (False, True):
        run.compile = compiled_shapes
        shapes.clear()
        found.append(nats_of(cfg, run, val, model, "lora")[0])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
    # of eight lengths
    assert {tuple(ids) for ids, *_ in shapes} <= {(3, 8 * i) for i in range(1, 9)}
    assert len({(targets, sets) for _, targets, sets in shapes}) == 1


def test_a_warm_a_tells_a_later_document_of_an_earlier_one(setting):
    """In the order of the batches: the n-th of the next batch goes on with the A of the n-th."""
    cfg = setting(**MODES["lora"] | dict(ttt_warm_start_a=True))
    run = Run(cfg)
    val, model = validation(cfg, run), lively_model(cfg, run)
    before = nats_of(cfg, run, val, model, "lora")[0]
    batches = [batch.spans for batch in train_gpt.document_batches(cfg, run, val)]
    full = [spans for spans in batches if len(spans) == 3]
    (start, end), (later, stop) = full[0][0], full[1][0]
    assert later + cfg.ttt_chunk_size < stop

    changed = validation(cfg, run)
    changed.tokens[start + 2] = 5 if val.tokens[start + 2] != 5 else 6
    differs = nats_of(cfg, run, changed, model, "lora")[0] != before
    assert differs[start + 1 : end].any() and not differs[: start + 1][-1:].any()
    # its first chunk is scored with B = 0
    assert not differs[later : later + cfg.ttt_chunk_size].any()
    assert differs[later + cfg.ttt_chunk_size : stop].any()
    others = torch.ones_like(differs)
    for spans in full:
        others[spans[0, 0] : spans[0, 1]] = False
    assert not differs[others].any()


# ── tilting by n-grams ────────────────────────────────────────────────────────────────────────────
GOLDEN = json.loads((Path(__file__).parent / "golden" / "tilt.json").read_text())


@pytest.mark.parametrize("case", GOLDEN["hints"], ids=lambda case: str(case["order"]))
def test_hints_are_those_of_the_record(case):
    """Whose stream begins with the first target twice."""
    targets = case["targets"]
    tokens = torch.tensor([targets[0], *targets])
    hints = ngram_hints(tokens, case["order"], case["threshold"])
    gated = (hints >= 0).nonzero().flatten()
    assert gated.tolist() == case["gated_positions"]
    assert hints[gated].tolist() == case["hints_at_gated"]
    assert (hints == tokens[1:]).sum() == case["hits"]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=40), st.integers(2, 6), st.floats(0, 1))
def test_hints_are_those_of_a_plain_loop(tokens, order, threshold):
    expected = []
    after = {}  # context -> what followed it, in order
    for t in range(len(tokens) - 1):
        context = tuple(tokens[max(t + 2 - order, 0) : t + 1])
        seen = after.setdefault(context, [])
        # the one that was first to come up as often as any
        often = max((seen.count(token) for token in seen), default=0)
        first = [token for i, token in enumerate(seen) if seen[: i + 1].count(token) == often]
        known = len(context) == order - 1 and seen and often / len(seen) >= threshold
        expected.append(first[0] if known else -1)
        seen.append(tokens[t + 1])
    assert ngram_hints(torch.tensor(tokens), order, threshold).tolist() == expected


def test_the_tilted_distribution_is_that_of_the_record():
    g = GOLDEN["formula"]
    logits = draw("tilt.logits", (16, 12), 2.0).double()
    nats = -logits.log_softmax(-1)
    every = torch.arange(12)
    for i, (hint, gate) in enumerate(zip(g["hint"], g["gate"], strict=True)):
        # of all tokens, as if each were the target
        hints = torch.full((12,), hint if gate else -1)
        tilt = SimpleNamespace(boost=g["beta"][i], hints=hints, hits=hints == every)
        found = NgramTilt.tilted(tilt, every, nats[i], nats[i, hint].expand(12))
        assert found[g["target"][i]].item() == pytest.approx(g["nll_after"][i], abs=1e-12)
        if i < 3:
            full = g["full_distribution_first_three_rows"][i]
            assert (-found).exp().tolist() == pytest.approx(full, abs=1e-12)


def test_the_last_way_of_scoring_is_tilted_and_says_what_that_did(setting):
    cfg = setting(**MODES["documents"], **TILT)
    run = Run(cfg)
    val, model = validation(cfg, run), lively_model(cfg, run)
    expected = one_by_one(model, val, rows_of(cfg, val, "documents"))
    nats, found = nats_of(cfg, run, val, model, "documents")
    hints = ngram_hints(val.tokens, 3, 0.5)
    assert 50 < (hints >= 0).sum() < 650
    torch.testing.assert_close(nats[hints < 0], expected[hints < 0])
    hits = hints == val.tokens[1:]
    odds_against = expected[hits].expm1() / math.exp(cfg.token_boost)
    assert hits.any()
    torch.testing.assert_close(nats[hits], odds_against.log1p())
    assert found.loss == pytest.approx(nats.double().mean().item(), rel=1e-9)
    assert found.without_tilt().loss == pytest.approx(expected.double().mean().item(), rel=1e-6)
    assert nats_of(cfg, run, val, model, "sliding")[1].plain == ()

    plain = found.without_tilt()._replace(seconds=1.0)
    scores = {"quantised": plain, "documents": found._replace(seconds=5.0)}
    train_gpt.add_scoring_toggles(run, scores, steps=7)
    rows = {name: activity.row(7) for name, activity in run.activity.items()}
    assert rows["DOC_ISOLATED_EVAL"]["effect"] == 0
    row = rows["NGRAM_TILT_ENABLED"]
    # the hints are its own
    both = run.activity["DOC_ISOLATED_EVAL"].cost_seconds + row["cost_seconds"]
    assert both == pytest.approx(4)
    assert row["effect"] == pytest.approx(found.bpb - found.without_tilt().bpb, rel=1e-9)
    both = map(train_gpt.block_sums, (nats, expected))
    margin = train_gpt.paired_margin(*both, math.log(2) * found.bytes)
    assert np.ptp(row["effect_interval"]) == pytest.approx(2 * margin, rel=1e-3)
    assert row["scope"] == "scoring documents" and row["cost_seconds"] > 0 and row["active"]


# ── seconds ───────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("mode", ["sliding", "documents", "ttt"])
def test_how_long_a_way_takes_is_counted_in_full_windows(setting, mode):
    """What the model is called with, forward and, counted twice, backward."""
    cfg = setting(**MODES[mode])
    run = Run(cfg)
    val, model = validation(cfg, run), lively_model(cfg, run)
    read = []

    def counted(module, inputs):
        read.append(inputs[0].numel() * (3 if torch.is_grad_enabled() else 1))

    model.register_forward_pre_hook(counted)
    nats_of(cfg, run, val, model, mode)
    expected, _ = train_gpt.SCORING_WAYS[mode].cost(cfg, run, val)
    # short documents are padded
    most = 3.0 if mode == "documents" else 1.05
    assert expected <= sum(read) / cfg.window <= most * expected


@pytest.mark.parametrize("compiled_shapes", [False, True])
def test_how_long_adapters_and_phases_take_is_counted_to_the_token(
    setting, monkeypatch, compiled_shapes
):
    """Backward, adapters take as long as forward, all weights twice."""
    more = dict(ttt_short_score_first_steps="40:4", global_ttt_epochs=2)
    cfg = setting(**PHASED | more)
    run = Run(cfg)
    val, model = validation(cfg, run), lively_model(cfg, run)
    read = []
    model.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0].numel()))
    backward = torch.Tensor.backward

    def counted(loss):
        read.append(read[-1] * (2 if model.tok_emb.requires_grad else 1))
        backward(loss)

    monkeypatch.setattr(torch.Tensor, "backward", counted)
    run.compile = compiled_shapes
    nats_of(cfg, run, val, model, "lora")
    expected, _ = train_gpt.test_time_cost(cfg, run, val)
    assert sum(read) == expected * cfg.window


@pytest.mark.parametrize(
    "cuda, world, seconds, said",
    [
        (False, 1, 900.0, "about 900 s at the speed of the fixed windows"),
        (True, 1, 4000.0, "about 4000 s at the speed of the fixed windows, 500 s on 8 GPUs"),
        (True, 2, 2800.0, "about 2800 s at the speed of the fixed windows, 700 s on 8 GPUs"),
        (True, 8, 599.0, "about 599 s at the speed of the fixed windows"),
        (True, 8, 601.0, "about 601 s at the speed of the fixed windows"),
        (True, 16, 601.0, "about 601 s at the speed of the fixed windows"),
    ],
)
def test_what_will_be_over_the_limit_of_the_contest_is_said_before_it_begins(
    cuda, world, seconds, said
):
    lines, warnings = [], []
    run = SimpleNamespace(cuda=cuda, world=world, log=lines.append, warn=warnings.append)
    train_gpt.tell_seconds(run, "ttt", seconds, "raise EVAL_STRIDE")
    assert lines == [f"score ttt: {said}"]
    there = seconds * min(world / 8, 1)
    over = f"score ttt: about {there:.0f} s on {max(world, 8)} GPUs, over the limit of 600 s; "
    expected = [over + "raise EVAL_STRIDE"] * (cuda and there > 600)
    assert warnings == expected


@pytest.mark.parametrize("compiled, pace", [(True, 4 / 7), (False, 104 / 11)])
def test_what_compiles_is_no_part_of_the_pace(setting, compiled, pace):
    """11 windows in three batches, of which the first takes 100 s and each other one 2 s."""
    cfg = setting()
    run = Run(cfg)
    val = validation(cfg, run)
    now = [10.0]
    run.tick = lambda: now[-1]
    run.compile = compiled

    def forward(ids, targets, positions):
        now.append(now[-1] + (2.0 if now[1:] else 100.0))
        return torch.zeros(targets.shape)

    assert score(cfg, run, forward, val).pace == pytest.approx(pace)


# ── ranks ─────────────────────────────────────────────────────────────────────────────────────────
def enter_rank(rank: int, job, port: int, folder: str, arguments: tuple) -> None:
    place = dict(
        RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port
    )
    os.environ |= {name: str(value) for name, value in place.items()}
    torch.set_num_threads(THREADS)
    torch.save(job(*arguments), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def two_ranks(job, *arguments, folder: Path) -> list:
    """[job(*arguments) on rank 0, on rank 1] of a gloo group."""
    port = free_port()
    serve()
    ranks = torch.multiprocessing.start_processes(
        enter_rank,
        (job, port, str(folder), arguments),
        nprocs=2,
        join=False,
        start_method="forkserver",
    )
    try:
        until(lambda: ranks.join(timeout=0.5), lambda: f"{job.__name__} on 2 ranks")
    finally:
        for process in ranks.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def score_everything(settings: dict) -> dict:
    """mode -> (bpb, final weights) on this process's ranks."""
    found = {}
    for name, cfg in settings.items():
        run = Run(cfg)
        model = lively_model(cfg, run)
        found[name] = (
            nats_of(cfg, run, validation(cfg, run), model, name.split()[0])[1].bpb,
            weights(model),
        )
    phases = train_gpt.GlobalPhases(cfg, run, model, model, None)
    with torch.no_grad():
        model.tok_emb += run.rank
    phases.agree()
    found["behind a phase"] = 0, weights(model)
    return found


def test_two_ranks_score_and_learn_the_same_as_one(setting, tmp_path):
    def settings(ranks):
        # 5 rows in batches of 4 and 1: one rank has none of the 1
        uneven = MODES["ttt"] | dict(ttt_chunk_tokens=320)
        # as many documents in a batch of all ranks
        lora = dict(ttt_batch_size=4 // ranks)
        tilted = MODES["documents"] | TILT
        more = {"ttt uneven": uneven, "documents tilted": tilted}
        more |= {"lora": MODES["lora"] | lora, "lora phased": PHASED | lora}
        return {mode: setting(**knobs) for mode, knobs in (MODES | more).items()}

    alone = score_everything(settings(1))
    first, second = two_ranks(score_everything, settings(2), folder=tmp_path)
    for mode, (bpb, _) in alone.items():
        # the weights' gradients are summed in another order
        close = 1e-4 if mode.split()[0] == "ttt" else 1e-6
        assert first[mode][0] == second[mode][0] == pytest.approx(bpb, rel=close), mode
        for name, w in alone[mode][1].items():
            assert torch.equal(first[mode][1][name], second[mode][1][name]), (mode, name)
            torch.testing.assert_close(first[mode][1][name], w, rtol=1e-3, atol=1e-4)
