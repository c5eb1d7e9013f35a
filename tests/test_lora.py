"""Test-time training of adapters, document by document.

tests/golden/ttt.json was made by running #1855's script as a black box. Would have caught: an
adapter that is left out at one visit or reads what leaves its part; a chunk that is scored after it
is learned; the A of the last batch in a batch that has sets of its own; a last document without its
last chunk; a global phase that begins with the longest documents, or goes on with old momentum.
"""

import itertools
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from roles import WIDTH, generator, golden_model
from test_documents import all_at_once, bounds_of, packed
from test_score import documents, setting  # noqa: F401

import train_gpt
from train_gpt import BOS, Adapters, Config, Run, ScoreSheet, main

GOLDEN = json.loads((Path(__file__).parent / "golden" / "ttt.json").read_text())
CASES = {case["name"]: case for case in GOLDEN["cases"]}
MODEL = GOLDEN["model"]
TOKENS = torch.tensor(GOLDEN["tokens"], dtype=torch.int32)
# Part of our model -> its name there
PARTS = {"q": "query", "k": "key", "v": "value", "o": "output", "mlp": "mlp", "head": "head"}


def config_of(settings: dict, logs: Path) -> Config:
    """Ours for the settings of the file."""
    loops, first, last = MODEL["loops"]
    phases = settings["global_sgd"] or {}
    knobs = dict(
        phased_ttt_enabled=bool(phases),
        phased_ttt_prefix_docs=phases.get("prefix_documents", 1),
        phased_ttt_num_phases=phases.get("phases", 1),
        global_ttt_lr=phases.get("lr", 0.0),
        global_ttt_momentum=phases.get("momentum", 0.9),
        global_ttt_chunk_tokens=phases.get("chunk_tokens", 64),
        global_ttt_batch_seqs=phases.get("sequences_per_step", 2),
        global_ttt_grad_clip=phases.get("clip", 1.0),
    )
    return Config(
        logs_dir=str(logs),
        vocab_size=MODEL["vocab"],
        num_layers=MODEL["layers"],
        model_dim=WIDTH,
        num_heads=MODEL["heads"],
        num_kv_heads=MODEL["kv_heads"],
        mlp_mult=4.0,
        train_seq_len=GOLDEN["window"],
        train_batch_tokens=GOLDEN["window"],
        eval_stride=0,
        init="default",
        doc_mask=True,
        negative_slope=MODEL["slope"],
        rope_dims=MODEL["rope_dims"],
        ln_scale=MODEL["ln_scale"],
        xsa_last_n=MODEL["xsa_last"],
        skip_gates_enabled=MODEL["skip_gate"],
        sparse_attn_gate_enabled=True,
        sparse_attn_gate_scale=MODEL["sparse_gate"],
        smear_gate=False,
        smear_gate_enabled=True,
        smear_mask_bos=True,
        logit_softcap=MODEL["softcap"],
        parallel_start_layer=MODEL["lane_start"],
        num_loops=loops,
        loop_start=first,
        loop_end=last,
        ttt_mode="lora",
        ttt_chunk_size=GOLDEN["chunk"],
        ttt_batch_size=settings["batch_documents"],
        ttt_lora_rank=settings["rank"],
        ttt_lora_alpha=settings["alpha"],
        ttt_lora_lr=settings["lr"],
        ttt_beta1=settings["betas"][0],
        ttt_beta2=settings["betas"][1],
        ttt_weight_decay=settings["weight_decay"],
        ttt_k_lora=settings["key_adapter"],
        ttt_warm_start_a=settings["warm_A"],
        **knobs,
    )


def golden_draw(adapters: Adapters, part: str, shape) -> torch.Tensor:
    """A of the file: (visits, sets, rank, columns)."""
    visits, *rest = shape
    bound = rest[-1] ** -0.5
    roles = [f"ttt.A.{PARTS[part]}.slot{visit}" for visit in range(visits)]
    if part == "head":
        roles = ["ttt.A.head"]
    drawn = [bound * (2 * generator(role).random(rest) - 1) for role in roles]
    return torch.from_numpy(np.stack(drawn).astype(np.float32)).to(torch.get_default_dtype())


def summary(tensor: torch.Tensor) -> dict[str, float]:
    flat = tensor.detach().flatten()
    return dict(sum_sq=flat.square().sum().item(), first=flat[0].item(), last=flat[-1].item())


def run_case(case: dict, logs: Path, monkeypatch) -> SimpleNamespace:
    """Our nats of every target, and the adapters behind each full batch, on the golden text."""
    cfg = config_of(case["settings"], logs)
    run = Run(cfg)
    model = golden_model(cfg)
    longest = train_gpt.longest_row(cfg, run)
    model.cos, model.sin = train_gpt.rotary_tables(cfg, model.dtype, longest)
    ones = torch.ones(len(TOKENS) - 1)
    val = SimpleNamespace(n=len(TOKENS) - 1, tokens=TOKENS, target_bytes=ones, tilt=None)
    monkeypatch.setattr(Adapters, "draw", golden_draw)
    sheets, adapters, batches = [], [], []
    total = ScoreSheet.total
    monkeypatch.setattr(ScoreSheet, "total", lambda sheet: (sheets.append(sheet), total(sheet))[1])
    work = train_gpt.DocumentLearner.work_through

    def watched(learner, batch):
        work(learner, batch)
        batches.append([starts[low] for low, _ in batch.spans.tolist()])
        if len(batch.spans) == cfg.ttt_batch_size:
            pairs = learner.adapters.pairs
            found = {}
            for key in case["adapters_after"][0]:
                part, *slot, which = key.split(".")
                pair = pairs[next(ours for ours, theirs in PARTS.items() if theirs == part)]
                tensor = getattr(pair, which.lower())
                found[key] = summary(tensor[int(slot[0].removeprefix("slot")) if slot else 0])
            adapters.append(found)

    starts = {low: i for i, (low, _) in enumerate(GOLDEN["spans"])}
    monkeypatch.setattr(train_gpt.DocumentLearner, "work_through", watched)
    score = train_gpt.test_time_train(cfg, run, model, model, val)
    return SimpleNamespace(
        nats=sheets[0].nats[:-1],
        adapters=adapters,
        batches=batches,
        model=model,
        score=score,
        warnings=run.warnings,
    )


def chunk_sums(nats: torch.Tensor) -> list[list[float]]:
    parts = [nats[low : low + length - 1] for low, length in GOLDEN["spans"]]
    return [[chunk.sum().item() for chunk in part.split(GOLDEN["chunk"])] for part in parts]


# ── Every case of the file ────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("name", CASES)
def test_scores_adapters_and_weights_are_those_of_the_record(exact, tmp_path, monkeypatch, name):
    case = CASES[name]
    found = run_case(case, tmp_path, monkeypatch)
    assert found.batches == case["batches_in_processing_order"]
    chunks = chunk_sums(found.nats)
    assert [len(each) for each in chunks] == [len(each) for each in case["nats_per_chunk"]]
    for ours, theirs in zip(chunks, case["nats_per_chunk"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-8)
    assert [sum(each) for each in chunks] == pytest.approx(case["nats_per_document"], abs=1e-8)

    # a set that begins with a batch of fewer documents, or is never used, leaves nothing behind
    used = (
        case["adapters_after"][-len(found.adapters) :]
        if case["settings"]["global_sgd"]
        else (case["adapters_after"])
    )
    for ours, theirs in zip(found.adapters[-len(used) :], used, strict=True):
        for key, golden in theirs.items():
            assert ours[key] == pytest.approx(golden, rel=1e-8, abs=1e-12), key

    weights = case["base_weights_after"]
    model = found.model
    ours = {
        "embedding": model.tok_emb,
        "block1.attention.query": model.blocks[1].attn.c_q.weight,
        "block3.mlp.down": model.blocks[3].mlp.proj.weight,
    }
    squares = {key: w.square().sum().item() for key, w in ours.items()}
    assert squares == pytest.approx(weights["sum_sq"], rel=1e-8)
    assert model.blocks[2].attn.q_gain.tolist() == pytest.approx(weights["block2_q_gain"], rel=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_in_float32_the_scores_are_as_near_as_the_records_own(tmp_path, monkeypatch, name):
    case = CASES[name]
    found = run_case(case, tmp_path, monkeypatch)
    sums = [sum(each) for each in chunk_sums(found.nats)]
    assert sums == pytest.approx(case["nats_per_document"], abs=2e-3)
    settings = case["settings"]
    assert found.score.acted == (settings["lr"] > 0 or bool(settings["global_sgd"]))
    still = "TTT_MODE=lora: the adapters learned nothing: TTT_LORA_LR=0.0"
    assert found.warnings == ([] if settings["lr"] else [still])


# ── Order and shapes ──────────────────────────────────────────────────────────────────────────────
def text_of(lengths) -> SimpleNamespace:
    """Documents with so many targets; the last has one fewer, as no other stands behind it."""
    tokens = torch.full((sum(lengths) + 1,), 5, dtype=torch.int32)
    tokens[np.cumsum([0, *lengths[:-1]]).tolist()] = BOS
    return SimpleNamespace(n=sum(lengths), tokens=tokens, tilt=None)


def test_the_longest_documents_go_first_and_short_ones_have_short_chunks():
    lengths = [30, 7, 90, 12, 7, 60, 33]
    steps = "13:2,61:4"
    cfg = Config(
        ttt_mode="lora", ttt_batch_size=2, ttt_chunk_size=16, ttt_short_score_first_steps=steps
    )
    batches = train_gpt.document_batches(cfg, SimpleNamespace(world=1), text_of(lengths))
    found = [[high - low for low, high in batch.spans.tolist()] for batch in batches]
    assert found == [[90], [33, 60], [12, 30], [7, 7]]
    # 60 targets are 61 tokens
    assert [batch.chunk for batch in batches] == [16, 4, 4, 2]
    assert [batch.chunks.tolist() for batch in batches] == [[6], [9, 15], [3, 8], [4, 4]]
    # of two as long the first goes first
    assert batches[-1].spans[0, 0] < batches[-1].spans[1, 0]


def test_of_fewer_documents_than_phases_some_phases_are_left_out():
    phases = dict(phased_ttt_enabled=True, phased_ttt_num_phases=3, phased_ttt_prefix_docs=9)
    cfg = Config(ttt_mode="lora", ttt_batch_size=1, **phases)
    assert train_gpt.phase_boundaries(cfg, 2) == [1, 2]
    batches = train_gpt.document_batches(cfg, SimpleNamespace(world=1), text_of([30, 40]))
    # behind the last batch there is nothing to gain
    assert train_gpt.phase_documents(cfg, batches) == {0: [[30, 70]]}


# ── One phase ─────────────────────────────────────────────────────────────────────────────────────
SHORT = 11  # targets of a document, in windows of 8


def small(logs, attend=train_gpt.sdpa, **knobs) -> SimpleNamespace:
    """A phase on documents of 12 tokens: (cfg, model, its GlobalPhases, text (n,))."""
    shape = dict(vocab_size=32, num_layers=2, model_dim=8, num_heads=2, num_kv_heads=1)
    window = dict(train_seq_len=8, train_batch_tokens=8, eval_stride=0, smear_gate=False)
    phase = dict(ttt_mode="lora", phased_ttt_enabled=True, global_ttt_lr=0.5, ttt_chunk_size=4)
    cfg = Config(**shape | window | phase | knobs, logs_dir=str(logs))
    run = Run(cfg)
    model = train_gpt.build_model(cfg, run, attend)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    tokens = torch.arange(1200, dtype=torch.int32) * 7 % 29 + 2
    tokens[:: SHORT + 1] = BOS
    val = SimpleNamespace(tokens=tokens, n=len(tokens) - 1)
    phases = train_gpt.GlobalPhases(cfg, run, model, model, val)
    return SimpleNamespace(cfg=cfg, run=run, model=model, phases=phases, tokens=tokens.long())


def phase_by_hand(cfg, model, tokens) -> None:
    """A phase on this text: each piece of each window by itself, and SGD written out."""
    size = cfg.global_ttt_chunk_tokens
    chunks = -(-(len(tokens) - 1) // size) - 1
    speed = [0.0 for _ in model.parameters()]
    # a step's windows side by side are one row, cut at documents and behind a window of one
    step = cfg.window * cfg.global_ttt_batch_seqs
    for chunk in range(chunks):
        lr = cfg.global_ttt_lr * 0.5 * (1 + math.cos(math.pi * chunk / chunks))
        for low in [*range(chunk * size, (chunk + 1) * size, step)] * cfg.global_ttt_epochs:
            high = min(low + step, (chunk + 1) * size)
            cuts = range(0, high - low + 1, cfg.window)
            if cfg.doc_mask:
                cuts = bounds_of(tokens[low:high].tolist(), cfg.window)
            nats = 0.0
            for a, b in itertools.pairwise(cuts):
                ids, targets = tokens[None, low + a : low + b], tokens[None, low + a + 1 :]
                nats = nats + model(ids, targets[:, : b - a]).sum()
            gradients = torch.autograd.grad(nats / (high - low), [*model.parameters()])
            norm = sum(g.square().sum() for g in gradients).sqrt()
            clip = (
                min(1.0, cfg.global_ttt_grad_clip / (norm + 1e-6))
                if cfg.global_ttt_grad_clip
                else 1.0
            )
            for i, p in enumerate(model.parameters()):
                speed[i] = cfg.global_ttt_momentum * speed[i] + clip * gradients[i]
                p.data -= lr * speed[i]


@pytest.mark.parametrize("seqs, clip, epochs", [(1, 0.0, 1), (2, 0.1, 2)])
@pytest.mark.parametrize("doc_mask", [False, True])
def test_a_phase_is_plain_sgd(exact, tmp_path, doc_mask, seqs, clip, epochs):
    knobs = dict(global_ttt_momentum=0.5, global_ttt_grad_clip=clip, global_ttt_epochs=epochs)
    row = dict(global_ttt_batch_seqs=seqs, global_ttt_chunk_tokens=24, doc_mask=doc_mask)
    ours, other = (small(tmp_path, **knobs, **row) for _ in range(2))
    ours.phases.learn([[low, low + SHORT] for low in range(0, 60, SHORT + 1)])
    phase_by_hand(other.cfg, other.model, ours.tokens[:60])
    start = [*small(tmp_path).model.parameters()]
    pairs = zip(ours.model.parameters(), other.model.parameters(), start, strict=True)
    for p, expected, before in pairs:
        torch.testing.assert_close(p, expected, rtol=1e-9, atol=1e-9)
        assert not torch.equal(p, before)


def test_a_row_of_a_phase_has_slots_for_each_of_its_documents(tmp_path):
    """500 documents in a row of 1,000 tokens: more than a kernel has slots for in training."""
    row = dict(global_ttt_batch_seqs=8, global_ttt_chunk_tokens=1000, doc_mask=True)
    length = dict(train_seq_len=125, train_batch_tokens=125)
    found = []
    for attend in (train_gpt.sdpa, packed(all_at_once)):
        ours = small(tmp_path, attend, **row, **length)
        ours.phases.val.tokens[::2] = BOS
        ours.phases.learn([[0, 1199]])
        found.append([p.detach() for p in ours.model.parameters()])
    assert ours.model.most_documents == 0
    for masked, as_packed in zip(*found, strict=True):
        torch.testing.assert_close(as_packed, masked)


def test_a_phase_that_ends_in_nan_names_its_learning_rate(tmp_path):
    ours = small(tmp_path, global_ttt_chunk_tokens=16)
    ours.model.tok_emb.data[5] = math.inf
    with pytest.raises(train_gpt.Refusal, match="not finite; lower GLOBAL_TTT_LR") as refusal:
        ours.phases.learn([[0, 60]])
    assert refusal.value.code == 5


# ── Adapters ──────────────────────────────────────────────────────────────────────────────────────
def test_the_settings_of_the_adapters_reach_them(tmp_path):
    def adapters(**knobs):
        ours = small(tmp_path, ttt_batch_size=2, ttt_lora_rank=4, **knobs)
        return Adapters(ours.cfg, ours.run, ours.model)

    assert adapters(ttt_lora_alpha=0.0).scale == 1 and adapters(ttt_lora_alpha=8.0).scale == 2
    assert adapters(ttt_beta1=0.3, ttt_beta2=0.9).optimiser.defaults["betas"] == (0.3, 0.9)
    for warm in (False, True):
        sets = adapters(ttt_warm_start_a=warm)
        drawn = []
        for count in (2, 2, 1, 2):
            sets.begin(count)
            drawn.append(sets.pairs["q"].a.detach().clone())
        same = [torch.equal(*pair) for pair in itertools.pairwise(drawn)]
        # a batch with fewer documents has had sets of its own
        assert same == [warm, False, False]


@pytest.mark.parametrize("part", train_gpt.ADAPTED)
def test_each_switch_takes_away_the_adapters_of_its_part_alone(part):
    names = dict(num_layers=2, model_dim=8, num_heads=2, num_kv_heads=1, vocab_size=16)
    cfg = Config(**names, **{train_gpt.ADAPTED[part]: False})
    parts = train_gpt.adapted_parts(cfg, train_gpt.GPT(cfg))
    assert parts.keys() == {*train_gpt.ADAPTED, "head"} - {part}
    assert {visits for name, (visits, _) in parts.items() if name != "head"} == {2}


# ── A whole run ───────────────────────────────────────────────────────────────────────────────────
def test_a_run_says_what_was_learned_and_its_artifact_is_scored_alike_by_itself(setting):  # noqa: F811
    knobs = dict(
        iterations=2,
        smear_gate=False,
        eval_stride=0,
        ttt_mode="lora",
        ttt_batch_size=2,
        ttt_chunk_size=16,
        ttt_lora_rank=2,
        ttt_lora_lr=0.01,
        phased_ttt_enabled=True,
        phased_ttt_num_phases=2,
        phased_ttt_prefix_docs=8,
        global_ttt_chunk_tokens=64,
        global_ttt_lr=0.1,
    )
    cfg = setting(**knobs)
    report = main(cfg)
    folder = Path(cfg.logs_dir) / cfg.run_id
    row = report["toggles"]["TTT_MODE"]
    scores = report["scores"]
    assert row["active"] and row["effect"] == scores["ttt"]["bpb"] - scores["quantised"]["bpb"]
    assert (report["scored"], report["val_tokens"]) == ("ttt", 700)
    log = (folder / "train.log").read_text()
    steps, size, phases = re.search(
        r"ttt: (\S+) steps of adapters, .* B behind a batch (\S+); (\S+) steps of all", log
    ).groups()
    assert int(steps) > 9 and float(size) > 0 and int(phases) > 1
    row = report["toggles"]["PHASED_TTT_ENABLED"]
    assert row["active"] and 0 < row["effect"] < 1 and row["last_step"] == int(phases) - 1

    artifact = folder / "artifact.bin"
    before = artifact.read_bytes()
    # which knows these settings
    again = main(setting(eval_only=str(artifact)))
    assert again["val_bpb"] == report["val_bpb"] and artifact.read_bytes() == before
