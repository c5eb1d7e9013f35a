"""The four conditions of issue #1017 of openai/parameter-golf, in every way of scoring.

C1 causality: what a target costs depends on the artifact and the tokens before it. C2 normalised:
the probabilities of all tokens that could stand there sum to 1. C3 score first: a target is scored
before anything that it changed is used on it. C4 single pass: every target once, in one pass.

Would have caught: test-time training on what it scores next (#568, #677), corrections that are
optimised on the scored tokens (#1240), n-gram caches that look at the true token alone, of which
all tokens' probabilities summed to 277 and more (#988), hints that are made of the target (#1420).
"""

import copy
import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch

import train_gpt
from train_gpt import Config, Run, ScoreSheet, build_model, score, scoring_work, sdpa

# ── Ways of scoring: a new one is one line here, and one in LEARNS if it learns ───────────────────
SLIDING = dict(eval_stride=4)
WAYS = {
    "fixed": dict(eval_stride=0),
    "sliding": SLIDING,
    "documents": SLIDING | dict(doc_isolated_eval=True),
    "ttt": SLIDING | dict(ttt_mode="sgd", ttt_chunk_tokens=16, ttt_lr=0.5, ttt_freeze_blocks=0),
}
ADAPTERS = dict(ttt_lora_rank=4, ttt_lora_lr=0.1)
WAYS["lora"] = SLIDING | dict(ttt_mode="lora", ttt_chunk_size=4, ttt_batch_size=2, **ADAPTERS)
PHASES = dict(phased_ttt_enabled=True, phased_ttt_prefix_docs=1, global_ttt_lr=0.5)
WAYS["lora, phased"] = WAYS["lora"] | PHASES | dict(eval_seq_len=8, global_ttt_chunk_tokens=8)
WAYS["lora, short chunks"] = WAYS["lora"] | dict(ttt_short_score_first_steps="19:2")
# name -> the knob that is its learning rate, which targets it scores before it learns
LEARNS = {
    "ttt": ("ttt_lr", range(16)),
    "lora": ("ttt_lora_lr", [start + i for start in (0, 16, 28) for i in range(4)]),
    # the phase is behind the first batch, which is the third document
    "lora, phased": ("global_ttt_lr", range(28, 47)),
    "lora, short chunks": ("ttt_lora_lr", [0, 1, 16, 17, *range(28, 32)]),
}

TILT = dict(ngram_tilt_enabled=True, token_order=3, token_threshold=0.5, token_boost=1.5)
TILTED = {f"{name}, tilted": knobs | TILT for name, knobs in WAYS.items() if name != "fixed"}
MODES = WAYS | TILTED


def plain(mode: str) -> str:
    """The mode without the tilt."""
    return mode.removesuffix(", tilted")


VOCABULARY = 8
# three documents, in which runs of two tokens come again
TOKENS = [1, 5, 6, 7, 2, 5, 6, 7, 3, 5, 6, 7, 4, 2, 0, 3, 1, 2, 5, 6, 7, 7, 3, 0, 4, 4, 2, 5]
TOKENS += [1, 3, 4, 5, 6, 7, 0, 2, 3, 4, 5, 6, 2, 2, 7, 0, 5, 6, 7, 2]
TARGETS = len(TOKENS) - 1
# its hint is 7, as it is itself
HINTED = 32


def test_every_way_of_scoring_and_every_mode_of_learning_is_in_the_table():
    configs = [Config(train_seq_len=16, **knobs) for knobs in MODES.values()]
    for name, way in train_gpt.SCORING_WAYS.items():
        assert any(way.wanted(cfg) for cfg in configs), name
    modes = set(train_gpt.BY_NAME["TTT_MODE"].metadata["choices"])
    assert modes == {cfg.ttt_mode for cfg in configs}
    for f in train_gpt.KNOBS:
        is_off = f.default is False or f.default in ("", "none")
        if f.metadata["scope"] == "eval" and is_off:
            assert any(getattr(cfg, f.name) != f.default for cfg in configs), f.name


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A run, and a model in which each target depends on all that it can see."""
    small = dict(vocab_size=VOCABULARY, num_layers=2, model_dim=8, num_heads=2, num_kv_heads=1)
    logs = tmp_path_factory.mktemp("logs")
    cfg = Config(**small, train_seq_len=16, eval_stride=0, eval_batch_seqs=4, logs_dir=str(logs))
    run = Run(cfg)
    model = build_model(cfg, run, sdpa)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return SimpleNamespace(cfg=cfg, run=run, model=model, start=copy.deepcopy(model.state_dict()))


@pytest.fixture
def scored(world, monkeypatch):
    """scored(mode, tokens, **knobs) -> what the pipeline gives, by the functions that it calls:
    nats of every target, and the targets in the order in which they were written.
    """
    sheets = []
    order = []
    write = ScoreSheet.write

    def watched(sheet, target, real, nats):
        sheets[:] = [sheet]
        order.extend(target[real].tolist())
        return write(sheet, target, real, nats)

    monkeypatch.setattr(ScoreSheet, "write", watched)
    # A BOS as the target opens no document: how they go together is no part of a distribution
    spans = train_gpt.document_spans(SimpleNamespace(tokens=torch.tensor(TOKENS), n=TARGETS))
    monkeypatch.setattr(train_gpt, "document_spans", lambda val: spans)

    def score_once(mode: str, tokens=tuple(TOKENS), **knobs):
        cfg = dataclasses.replace(world.cfg, **MODES[mode] | knobs)
        model = world.model
        model.load_state_dict(world.start)
        val = SimpleNamespace(
            tokens=torch.tensor(tokens, dtype=torch.int32),
            target_bytes=torch.ones(TARGETS, dtype=torch.int64),
            n=TARGETS,
            tilt=None,
        )
        order.clear()
        work = [*scoring_work(cfg, world.run, model, model).values()]
        if work:
            work[-1](val)
        else:
            score(cfg, world.run, model, val)
        return SimpleNamespace(nats=sheets[0].nats[:-1].clone(), order=[*order])

    return score_once


@pytest.mark.parametrize("mode", MODES)
def test_c1_a_token_changes_nothing_before_it_and_c2_each_target_has_a_distribution(scored, mode):
    """Also C3: what had learned from the target would expect each token more than itself does.

    The target with a hint in the third document, behind two chunks.
    """
    start = scored(mode)
    before = start.nats
    place = HINTED + 1
    earlier = [*range(HINTED)]
    if "phased" in mode:  # its document goes first, and the others learn from it
        earlier = start.order[: start.order.index(HINTED)]
    each = []
    for token in range(VOCABULARY):
        nats = scored(mode, [*TOKENS[:place], token, *TOKENS[place + 1 :]]).nats
        assert torch.equal(nats[earlier], before[earlier])
        changed = token != TOKENS[place]
        assert (nats[HINTED] != before[HINTED]) == changed
        assert torch.equal(nats[place:], before[place:]) != changed
        each.append(nats[HINTED].item())
    assert sum(math.exp(-nats) for nats in each) == pytest.approx(1, abs=2e-6)


@pytest.mark.parametrize("mode", TILTED)
def test_the_tilt_acts_on_targets_with_a_hint_alone(scored, mode):
    """Of these the test above looks at one, as its hint says and with each other token."""
    hints = train_gpt.ngram_hints(torch.tensor(TOKENS), 3, 0.5)
    hit = hints == torch.tensor(TOKENS[1:])
    assert hints[HINTED] == 7 and hit[HINTED]
    change = scored(mode).nats - scored(mode, ngram_tilt_enabled=False).nats
    assert (change[hints < 0] == 0).all() and (change[hit] < 0).all()
    missed = change[(hints >= 0) & ~hit]
    assert (missed >= 0).all() and missed.any()


@pytest.mark.parametrize("mode", [mode for mode in MODES if plain(mode) in LEARNS])
def test_c3_what_is_scored_first_is_scored_as_without_learning(scored, mode):
    """And at a learning rate of 0 all of it."""
    name = plain(mode)
    rate, first = LEARNS[name]
    learned = scored(mode).nats
    still = scored(mode, **{rate: 0.0}).nats
    same = (learned == still).nonzero().flatten()
    assert same.tolist() == list(first)
    if name == "ttt":
        assert torch.equal(still, scored(mode, ttt_mode="none").nats)


@pytest.mark.parametrize("mode", MODES)
def test_c4_every_target_is_scored_once_and_what_learns_goes_on_from_there(scored, mode):
    order = scored(mode).order
    assert sorted(order) == list(range(TARGETS))
    name = mode.split(",")[0]
    if name == "ttt":
        chunks = [target // 16 for target in order]
        assert chunks == sorted(chunks)
    if name == "lora":
        for start, end in ((0, 16), (16, 28), (28, TARGETS)):
            assert [target for target in order if start <= target < end] == list(range(start, end))
