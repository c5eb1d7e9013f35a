"""The artifact: what is in it, how large it is, and what a reader does with a damaged one.

Would have caught: exports that do not equal what was trained (#304, #975); the wrong layer kept in
fp16 (#989's blocks.8); artifacts over the cap that nobody noticed (#194, #975, #989) and sizes
that were not those of the shipped files (#1835); a zstd file that its own reader could not open
(#199); pickles, which run a stranger's code when loaded.
"""

import ast
import dataclasses
import hashlib
import itertools
import json
import lzma
import math
import platform
import signal
import statistics
import sys
import tracemalloc
import zlib
from pathlib import Path
from types import SimpleNamespace

import brotli
import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import zstandard
from conftest import HANG
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from train_gpt import (
    COMPRESSORS,
    EMBED_ROLE,
    FORMAT_VERSION,
    GPT,
    HEADER,
    MAGIC,
    MAX_RAW_BYTES,
    PACKED_NAME,
    RANS_TOTAL,
    ZSTD_FRAME,
    CodeModel,
    Config,
    Grid,
    Refusal,
    Run,
    ans_decode,
    ans_encode,
    as_shipped,
    code_size,
    encode_artifact,
    encode_container,
    export,
    export_plan,
    main,
    prune,
    quantised,
    read_artifact,
    read_container,
    sizes_by_kind,
    write_atomic,
)

CHOICES = [name for name in COMPRESSORS if name != "none"]  # of the knob COMPRESSOR


@pytest.fixture
def product(tiny):
    """product(**knobs) -> (cfg, a state like a trained one, its plan)."""

    def make(**knobs):
        cfg = tiny(**knobs)
        torch.manual_seed(0)
        model = GPT(cfg)
        state = {n: p.detach() + 0.1 * torch.randn(p.shape) for n, p in model.named_parameters()}
        return cfg, state, export_plan(cfg, model)

    return make


@pytest.fixture
def artifact(product, tmp_path):
    """A good artifact of the tiny configuration on disk."""
    cfg, state, plan = product()
    path = tmp_path / "artifact.bin"
    path.write_bytes(encode_artifact(cfg, quantised(cfg, state, plan)))
    return path


# ── pack and unpack ───────────────────────────────────────────────────────────────────────────────
ALL_ON = dict(
    bigram_vocab_size=64,
    bigram_dim=16,
    ve_enabled=True,
    ve_dim=8,
    ve_layers="1,2",
    quant_bits_mlp=5,
    quant_bits_bigram=8,
    quant_bits_embed=8,
)
GRIDS = [
    dict(),
    dict(quant_clip="amax", quant_codes="asym", quant_scale_floor=False),
    dict(quant_clip="search5"),
]


def test_an_artifact_is_always_compressed():
    assert next(f for f in train_gpt.KNOBS if f.name == "compressor").metadata["choices"] == tuple(
        CHOICES
    )


@pytest.mark.parametrize("knobs", GRIDS, ids=str)
@pytest.mark.parametrize("compressor", CHOICES)
def test_what_is_read_back_is_exactly_what_was_shipped(product, tmp_path, compressor, knobs):
    cfg, state, plan = product(compressor=compressor, **ALL_ON, **knobs)
    path = tmp_path / "a.bin"
    path.write_bytes(encode_artifact(cfg, quantised(cfg, state, plan)))
    found, weights = read_artifact(path)
    assert found == cfg.knobs("model", "eval") and weights.keys() == state.keys()
    for name, w in state.items():
        assert weights[name].dtype == torch.float32 and torch.equal(
            weights[name], as_shipped(w, plan[name])
        ), name


@pytest.mark.parametrize("compressor", CHOICES)
def test_the_same_weights_give_the_same_bytes_whatever_their_order(product, compressor):
    cfg, state, plan = product(compressor=compressor)
    parts = quantised(cfg, state, plan)
    assert encode_artifact(cfg, parts) == encode_artifact(cfg, dict(reversed(parts.items())))


@pytest.mark.parametrize("level", [1, 9])
def test_the_level_reaches_the_compressor_and_the_reader_needs_no_setting(product, tmp_path, level):
    sizes = {}
    for compressor in CHOICES:
        cfg, state, plan = product(compressor=compressor, compress_level=level)
        parts = quantised(cfg, state, plan)
        (tmp_path / compressor).write_bytes(blob := encode_artifact(cfg, parts))
        assert blob == encode_artifact(product(compressor=compressor)[0], parts, level)
        sizes[compressor] = len(blob)
        assert read_artifact(tmp_path / compressor)[1].keys() == state.keys()
    assert len(set(sizes.values())) == len(CHOICES) == 5


@pytest.mark.parametrize("codes", ["sym", "asym"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("floor", [True, False])
def test_requantising_the_shipped_weights_changes_nothing(bits, codes, floor):
    w = (
        torch.randn(64, 96, generator=torch.Generator().manual_seed(1))
        * torch.logspace(-9, 2, 64)[:, None]
    )
    once = Grid(bits, "amax", codes, floor).fake_quantise(w)
    assert torch.equal(Grid(bits, "amax", codes, floor).fake_quantise(once), once)


@pytest.mark.parametrize("bits", [5, 6, 8])
def test_requantising_with_a_quantile_clip_keeps_the_codes_and_moves_a_step_by_one_fp16_ulp_at_most(
    bits,
):
    grid = Grid(
        bits, "quantile"
    )  # interpolates between the two largest weights of a row, which snapping moves
    codes, scale = grid.quantise(torch.randn(64, 512, generator=torch.Generator().manual_seed(1)))
    again, rescaled = grid.quantise(grid.dequantise(codes, scale))
    assert torch.equal(codes, again)
    torch.testing.assert_close(rescaled, scale, rtol=2**-10, atol=0)


# ── entropy coding ────────────────────────────────────────────────────────────────────────────────
def gaussian(rows: int, columns: int, spread: float = 8.0, seed: int = 0) -> torch.Tensor:
    noise = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return (noise * spread).round().clamp(-31, 31).to(torch.int8)


def order0_bytes(codes: torch.Tensor) -> float:
    n = np.unique(codes.numpy(), return_counts=True)[1]
    return float(n @ np.log2(n.sum() / n)) / 8


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(4, 60), st.integers(4, 60)), min_size=1, max_size=4),
    seed=st.integers(0, 9999),
    bits=st.integers(2, 8),
    zeros=st.sampled_from([0.0, 0.5, 0.99, 1.0]),
)
def test_any_codes_come_back_bit_for_bit(shapes, seed, bits, zeros):
    g, tensors = np.random.default_rng(seed), {"float": torch.ones(2)}
    for i, shape in enumerate(shapes):
        codes = (
            g.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), shape)
            * (g.random(shape) >= zeros)
            // g.integers(1, 9, (shape[0], 1))
        )
        tensors |= {
            f"{i}:codes": torch.from_numpy(codes.astype(np.int8)),
            f"{i}:scale": torch.ones(shape[0], 1).half(),
        }
    parts = ans_encode(tensors)
    found = ans_decode(parts) if ":stream" in parts else parts
    assert found.keys() == tensors.keys() and all(
        torch.equal(found[name], t) for name, t in tensors.items()
    )
    in_stream = {name for name in tensors if name not in parts}
    assert {":coded", ":stream"} & parts.keys() == ({":coded", ":stream"} if in_stream else set())
    assert all(min(tensors[name].shape) >= train_gpt.SHORTEST for name in in_stream)
    assert torch.equal(parts["float"], tensors["float"])


@pytest.mark.parametrize("shape", [(8, 8), (8, 12), (15, 16), (8, 31), (8, 32)], ids=str)
@pytest.mark.parametrize("low, high", [(-31, 31), (3, 9), (-9, -3), (7, 7)])
def test_few_codes_and_codes_without_a_0_come_back(shape, low, high):
    """Fewer than there are remainders; symbols that a normal distribution does not reach."""
    codes = torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(0)).char()
    parts = ans_encode({"w:codes": codes})
    assert ":stream" in parts and torch.equal(ans_decode(parts)["w:codes"], codes)


def test_codes_without_structure_take_their_order_0_entropy():
    codes = gaussian(1000, 1200)
    parts = ans_encode({"w:codes": codes})
    assert 1 - 0.001 < 2 * len(parts[":stream"]) / order0_bytes(codes) < 1.001
    sizes = [len(encode_container({"w:codes": codes}, {}, name)) for name in ("ans", "zstd")]
    assert sizes[0] < 1.002 * order0_bytes(codes) < sizes[1]


@pytest.mark.parametrize("axis", [0, 1])
def test_rows_and_columns_of_unlike_spread_take_less_than_their_order_0_entropy(axis):
    spread = torch.logspace(-1, 1, 600)
    codes = gaussian(600, 600, spread[:, None] if axis == 0 else spread[None])
    assert len(encode_container({"w:codes": codes}, {}, "ans")) < 0.85 * order0_bytes(codes)


def test_lines_of_unlike_spread_are_trusted_to_be_so():
    spread = torch.logspace(-0.5, 0.5, 64)
    codes = {
        "alike": gaussian(64, 64),
        "rows": gaussian(64, 64, 8 * spread[:, None]),
        "columns": gaussian(64, 64, 8 * spread),
    }
    facts = train_gpt.described({name: t.numpy() for name, t in codes.items()})["codes"]
    trusts = {name: line[4::2] for name, line in facts.items()}
    assert min(trusts["alike"]) > 6 and trusts["rows"][0] < 3 and trusts["columns"][1] < 3
    assert min(trusts["rows"][1], trusts["columns"][0]) > 5


def code_model(codes: torch.Tensor) -> CodeModel:
    return CodeModel(train_gpt.described({"w:codes": codes.numpy()}))


def test_each_code_is_in_one_group_and_a_group_is_spread_over_all_rows_and_columns():
    codes = gaussian(300, 256)
    groups = list(code_model(codes).groups())
    assert sorted(np.concatenate(groups).tolist()) == list(range(codes.numel()))
    for known, group in itertools.pairwise(itertools.accumulate(map(len, groups))):
        assert (group - known) / known < 0.16 or group - known <= 307  # one remainder
    for group in groups[-4:]:
        for lines in (group // 256, group % 256):
            counts = np.bincount(lines)
            assert counts.max() <= counts.min() + 5


def test_a_stream_is_as_long_as_its_frequencies_say():
    model = code_model(codes := gaussian(300, 256, torch.linspace(2, 9, 256)))
    slots = model.coded(codes.numpy().ravel())
    bits = sum((train_gpt.RANS_BITS - np.log2(owned)).sum() for owned, _ in slots)
    words = train_gpt.rans_encode(slots, lanes := model.lanes)
    assert lanes == 5 and 0 <= 16 * len(words) - bits < 0.0005 * bits + 32 * lanes
    again = code_model(codes)
    flat = again.decoded(train_gpt.RansDecoder(words.astype(int), lanes))
    assert (flat == codes.numpy().ravel()).all()


class Constriction:
    """The ANS coder of another hand, in RansDecoder's place. constriction is a stack of words."""

    def __init__(self, words: np.ndarray | None = None):
        import constriction

        coder = constriction.stream.stack.AnsCoder
        self.stack = coder() if words is None else coder(words)
        self.model = constriction.stream.model.Categorical(perfect=False)

    def shares(self, spreads: np.ndarray, frequency: np.ndarray) -> np.ndarray:
        return (frequency / RANS_TOTAL).astype(np.float32)[spreads]

    def encoded(self, codes: np.ndarray, model: CodeModel) -> np.ndarray:
        told = []
        for places in model.groups():
            where, spreads = model.classes(places)
            frequency = model.frequency()
            symbols = codes[places] - model.lowest
            told.append((symbols.astype(np.int32), self.shares(spreads, frequency)))
            model.learn(where, spreads * frequency.shape[1] + symbols, codes[places])
        for symbols, shares in reversed(told):
            self.stack.encode_reverse(symbols, self.model, shares)
        return self.stack.get_compressed()

    def keys(self, spreads: np.ndarray, frequency: np.ndarray) -> np.ndarray:
        symbols = self.stack.decode(self.model, self.shares(spreads, frequency))
        return spreads * frequency.shape[1] + symbols

    def finish(self) -> None:
        assert self.stack.is_empty()


NO_WHEEL = sys.platform == "linux" and platform.machine() != "x86_64"


@pytest.mark.skipif(NO_WHEEL, reason="constriction has no wheel for this machine")
def test_a_stream_is_hardly_longer_than_constrictions():
    """By 32 bits a lane, its state, and one in 4,000; that has one state of 64 bits."""
    codes = gaussian(300, 256, torch.linspace(2, 9, 256))
    flat = codes.numpy().ravel()
    theirs = Constriction().encoded(flat, code_model(codes))
    model = code_model(codes)
    slots = model.coded(flat)
    ours = train_gpt.rans_encode(slots, model.lanes)
    bits = sum((train_gpt.RANS_BITS - np.log2(owned)).sum() for owned, _ in slots)
    assert 0 <= 8 * theirs.nbytes - bits <= 64
    assert -64 <= 8 * (ours.nbytes - theirs.nbytes) < 32 * model.lanes + bits / 4000
    for decoder in (Constriction(theirs), train_gpt.RansDecoder(ours.astype(int), model.lanes)):
        assert (code_model(codes).decoded(decoder) == flat).all()


def test_before_any_code_is_seen_a_level_expects_a_normal_distribution():
    counts = train_gpt.expected_counts(-31, 31)
    variances = train_gpt.fine_classes()[2::4] / (1 << train_gpt.VARIANCE_BITS)
    assert len(counts) == len(variances) and (variances[1:] / variances[:-1] < 1.19).all()
    for count, variance in list(zip(counts, variances, strict=True))[16:46]:
        normal = statistics.NormalDist(0, math.sqrt(variance - 1 / 12))
        edges = [normal.cdf(code - 0.5) for code in range(-31, 33)]
        expected = np.diff(edges) / (edges[-1] - edges[0])
        assert np.abs(count / count.sum() - expected).max() < 0.03 * expected.max(), variance


def test_what_was_seen_moves_the_frequencies_of_its_level():
    model = code_model(gaussian(64, 64, 2))
    before = model.frequency()
    (where, level), places = model.classes(first := next(model.groups())), len(first)
    codes = np.full(places, 3)
    model.learn(where, level * before.shape[1] + codes - model.lowest, codes)
    after = model.frequency()
    for frequency in (before, after):
        assert (frequency.sum(1) == RANS_TOTAL).all() and frequency.min() >= 1
    moved = np.flatnonzero((after != before).any(1))
    assert moved.tolist() == np.unique(level).tolist()
    assert (after[moved, 3 - model.lowest] > before[moved, 3 - model.lowest]).all()


@pytest.mark.parametrize("power", range(13))
def test_a_state_on_the_edge_of_32_bits_is_halved_first(power):
    """A symbol of frequency 2^power met in the very state 2^(17 + power).

    One of 2^(14 - power) makes that state of the first one. A coder that lets the edge pass breaks
    some artifact in a hundred.
    """
    frequency = np.array([[1 << 14 - power, 1 << power, 0]])
    frequency[0, 2] = RANS_TOTAL - frequency.sum()
    before = train_gpt.slots_before(frequency)
    # the last one is coded first
    slots = [tuple(values[0, [symbol]] for values in (frequency, before)) for symbol in (1, 0)]
    words = train_gpt.rans_encode(slots, 1)
    assert len(words) == 3  # the upper and the lower half of the state, and what was sent before
    decoder = train_gpt.RansDecoder(words.astype(int), 1)
    level = np.zeros(1, int)
    assert [decoder.keys(level, frequency).item() for _ in slots] == [1, 0]
    decoder.finish()


def test_rows_that_are_alike_are_left_to_brotli():
    """The embeddings of tokens never seen: brotli finds their bytes, no spread does."""
    codes = gaussian(256, 64)
    unseen = codes.clone()
    unseen[::4] = codes[0] + (torch.rand(64, 64) < 0.05)
    assert "w:codes" in ans_encode({"w:codes": unseen}) and ":stream" in ans_encode(
        {"w:codes": codes}
    )


# ── brotli ────────────────────────────────────────────────────────────────────────────────────────
def test_what_brotli_gets_is_arranged_and_smaller_for_it():
    """Columns of unlike spread, read one after the other; and exponents apart from the noise."""
    hidden = gaussian(64, 512, 8 * torch.logspace(-1, 0, 512)[torch.randperm(512)])
    for tensors in ({"w:codes": hidden}, {"a": torch.randn(9000).half(), "b": torch.ones(3, 2)}):
        raw = [b"".join(map(bytes, train_gpt.serialise(tensors, {}, how))) for how in (False, True)]
        plain, made = (len(brotli.compress(payload, quality=11)) for payload in raw)
        assert made < 0.98 * plain and len(encode_container(tensors, {}, "brotli")) < made + 99
        back = train_gpt.in_order(train_gpt.arranged(tensors))
        assert all(torch.equal(back[name], t) for name, t in tensors.items())


def coded(facts: str) -> torch.Tensor:
    return torch.tensor(list(facts.encode()), dtype=torch.int8)


@pytest.fixture(scope="module")
def good_parts() -> dict:
    return ans_encode({"w:codes": gaussian(100, 100), "w:scale": torch.ones(200, 1).half()})


@pytest.mark.parametrize(
    "spoil",
    [
        lambda p: p.pop(":coded"),
        lambda p: p.update({":stream": p[":stream"][:-1]}),
        lambda p: p.update({":stream": p[":stream"][:1]}),
        lambda p: p.update({":stream": p[":stream"][:0]}),
        lambda p: p.update({":stream": torch.cat((p[":stream"], p[":stream"][:1]))}),
        lambda p: p.update({":stream": p[":stream"].repeat(9)}),
        lambda p: p.update({":stream": p[":stream"][None]}),
        lambda p: p.update({":stream": p[":stream"].float()}),
        lambda p: p.update({":stream": p[":stream"].flip(0)}),
        lambda p: p.update({"w:codes": torch.zeros(100, 100, dtype=torch.int8)}),
        lambda p: p.update({":coded": p[":coded"][:-1]}),
        lambda p: p.update({":coded": p[":coded"].float()}),
        # good, but for a megabyte of spaces
        lambda p: p.update({":coded": F.pad(p[":coded"], (0, train_gpt.MAX_FACTS), value=32)}),
        *(
            lambda p, facts=facts: p.update({":coded": coded(facts)})
            for facts in (
                "[]",
                "[" * 5000,
                "{}",
                '{"symbols": [-31, 31], "codes": {}}',
                '{"symbols": [-31, 31], "codes": {"w:codes": [100, 100, 180, 170, 5, 170]}}',
                '{"symbols": [-31, 31], "codes": {"w:codes": [100, 100, 180, 170, 5, 170, 5.5]}}',
                '{"symbols": [-31, 31], "codes": {"w:codes": [100, 100, 180, 170, 5, 170, 1e99]}}',
                '{"symbols": [-31, 31], "codes": {"w:codes": [100, 100, 180, 170, 5, 170, 64]}}',
                '{"symbols": [-31, 31], "codes": {"w:codes": [100, 100, 180, 170, -1, 170, 5]}}',
                '{"symbols": [-31, 31], "codes": {"w:codes": [100, 100, 999, 170, 5, 170, 5]}}',
                '{"symbols": [-31, 31], "codes": {"w:codes": [100, 100, 180, 999, 5, 170, 5]}}',
                '{"symbols": [-31, 31], "codes": {"w:codes": [100, 100, 180, 170, 5, -1, 5]}}',
                '{"symbols": [-31, 31], "codes": {"w:codes": [10000, 1, 180, 170, 5, 170, 5]}}',
                '{"symbols": [-31, 31], "codes": {"w:codes": [-100, -100, 180, 170, 5, 170, 5]}}',
                '{"symbols": [-31, 31], "codes": {"w:codes": [99999, 99999, 180, 170, 5, 170, 5]}}',
                '{"symbols": [-31, 31], "codes": {"w:codes": [9999999, 8, 180, 170, 5, 170, 5]}}',
                '{"symbols": [-31, 31], "codes": [[100, 100, 180, 170, 5, 170, 5]]}',
                '{"symbols": [-31, 3100], "codes": {"w:codes": [100, 100, 180, 170, 5, 170, 5]}}',
                '{"symbols": [-31.5, 31], "codes": {"w:codes": [100, 100, 180, 170, 5, 170, 5]}}',
                '{"symbols": [31, -31], "codes": {"w:codes": [100, 100, 180, 170, 5, 170, 5]}}',
                '{"symbols": [1, 31], "codes": {"w:codes": [100, 100, 180, 170, 5, 170, 5]}}',
                '{"symbols": [-31, -1], "codes": {"w:codes": [100, 100, 180, 170, 5, 170, 5]}}',
                '{"symbols": "ab", "codes": {"w:codes": [100, 100, 180, 170, 5, 170, 5]}}',
                '{"symbols": [-31, 31], "codes": {"w:codes": [100, 100, 180, 170, 5, 170, 5]}}',
            )
        ),
    ],
    ids=itertools.count(),
)
def test_parts_that_nobody_coded_are_refused_in_little_memory(spoil, tmp_path, good_parts):
    parts = {name: part.clone() for name, part in good_parts.items()}
    spoil(parts)
    (tmp_path / "a.bin").write_bytes(encode_container(parts, {}, "zstd"))
    tracemalloc.start()
    try:
        with pytest.raises(Refusal, match=r"a\.bin"):
            read_artifact(tmp_path / "a.bin")
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


def test_zstd_frames_are_read_as_one_file_and_cost_next_to_nothing():
    """They save 2 to 6 % of trained weights: tables and codes do not share their statistics."""
    raw = safetensors.torch.save(
        {"w:codes": gaussian(1500, 600), "table": (0.05 * torch.randn(400, 500)).half()}
    )
    one, blob = (
        zstandard.ZstdCompressor(level=22).compress(raw),
        COMPRESSORS["zstd"].compress(raw, 22),
    )
    assert len(raw) > 5 * ZSTD_FRAME and len(blob) < 1.005 * len(one)
    for file in (one, blob):  # older artifacts are one frame
        assert (
            COMPRESSORS["zstd"].decompress(file, len(raw)) == raw
            and COMPRESSORS["zstd"].decompress(file, 1000) == raw[:1000]
        )


@pytest.mark.parametrize("compressor", CHOICES)
def test_the_codes_entropy_and_their_share_of_the_artifact_are_reported(product, compressor):
    cfg, state, plan = product(compressor=compressor, keep_float_max_numel=64)
    codes = torch.cat(
        [
            how.quantise(state[name])[0].flatten()
            for name, how in plan.items()
            if isinstance(how, Grid)
        ]
    )
    parts = quantised(cfg, state, plan)
    total = len(encode_artifact(cfg, parts))
    found = code_size(cfg, parts, total)
    floats = {name: parts[name] for name, how in plan.items() if not isinstance(how, Grid)}
    assert found == dict(
        compressor=compressor,
        weights=len(codes),
        order0_bytes=pytest.approx(order0_bytes(codes), abs=1),
        stored_bytes=total - len(encode_artifact(cfg, floats)),
    )
    assert code_size(cfg, {}, total) == {}


# ── Names that stay in fp16 ───────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    "patterns, wrong, meant",
    [
        ("tok_embd", "tok_embd", "tok_emb"),
        ("tok_emb, blocks.1.attn.ck", "blocks.1.attn.ck", "blocks.1.attn.c_k"),
        ("blocks.8.attn.c_k", "blocks.8.attn.c_k", "blocks.2.attn.c_k"),
        ("mlp.fc,smeer", "smeer", "smear"),
        ("*", "*", "tok_emb or attn.c_k"),
    ],
)
def test_a_pattern_that_no_tensor_has_in_its_name_is_refused_with_the_likeliest_one(
    tiny, patterns, wrong, meant, capsys
):
    cfg = tiny(fp16_keep_name_patterns=patterns)
    with pytest.raises(train_gpt.Refusal) as refusal:
        main(cfg)
    assert refusal.value.code == 2
    line = str(refusal.value)
    assert line.startswith(f"FP16_KEEP_NAME_PATTERNS={wrong}: ") and len(line.splitlines()) == 1
    assert f"did you mean {meant}" in line
    # before anything is trained, warm-up included
    assert (
        capsys.readouterr().out.splitlines()[-1].startswith("stopped in phase 'set-up and other'")
    )
    assert not (Path(cfg.logs_dir) / cfg.run_id).exists()


@pytest.mark.parametrize("patterns", ["", " , ", "tok_emb", "attn.c_k, ,mlp", "blocks.2."])
def test_patterns_that_tensors_have_in_their_names_are_taken(tiny, patterns):
    cfg = tiny(fp16_keep_name_patterns=patterns)
    plan = export_plan(cfg, GPT(cfg))
    kept = [
        name for name in plan if any(p.strip() and p.strip() in name for p in patterns.split(","))
    ]
    assert not any(isinstance(plan[name], Grid) for name in kept)
    assert bool(kept) == bool(patterns.strip(", "))


# ── the plan ──────────────────────────────────────────────────────────────────────────────────────
SEEDS = ("989", "194", "975", "145")


def full_size_plan(seed: str, **settings: str) -> dict:
    """Tensor name -> bits, or "fp16" / "fp32", for the seed's model at its true size, on meta."""
    cfg = Config.from_env({"BASE": f"pr{seed}", "INIT": "default"} | settings)
    with torch.device("meta"):
        plan = export_plan(cfg, GPT(cfg))
    floats = {torch.float16: "fp16", torch.float32: "fp32"}
    return {name: how.bits if isinstance(how, Grid) else floats[how] for name, how in plan.items()}


def kinds(plan: dict, part: str) -> set:
    return {
        how
        for name, how in plan.items()
        if part in name and name.endswith(("weight", "embed", "tok_emb"))
    }


@pytest.mark.parametrize(
    "seed, part, expected",
    [
        ("989", "tok_emb", {"fp16"}),
        ("989", "mlp.", {5}),
        ("989", "attn.c_q", {6}),
        ("989", "attn.c_v", {6}),
        ("989", "blocks.8.attn.c_k", {"fp16"}),
        ("989", "blocks.9.attn.c_k", {6}),
        ("989", "bigram.", {6}),
        ("194", "tok_emb", {"fp16"}),
        ("194", "blocks.", {6}),
        ("975", "tok_emb", {8}),
        ("975", "value_embed.embed", {8}),
        ("975", "bigram.embed", {8}),
        ("975", "blocks.", {6}),
        ("975", "bigram.proj", {"fp16"}),
        ("975", "value_embed.proj", {"fp16"}),
        ("145", "tok_emb", {8}),
        ("145", "blocks.", {8}),
    ],
)
def test_each_tensor_of_a_seed_is_shipped_as_in_the_seed(seed, part, expected):
    assert kinds(full_size_plan(seed), part) == expected


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_control_tensors_ship_as_control_dtype_says_and_every_matrix_is_planned(seed, dtype):
    plan = full_size_plan(seed, CONTROL_DTYPE=dtype)
    control = {name for name in plan if not name.endswith(("weight", "embed", "tok_emb"))}
    assert {n.split(".")[-1] for n in control} >= {
        "q_gain",
        "resid_mix",
        "attn_scale",
        "mlp_scale",
        "skip_weights",
    }
    assert {plan[name] for name in control} == {dtype}
    if dtype == "fp32":
        assert {name for name, how in plan.items() if how == "fp32"} == control


def test_control_tensors_come_back_as_their_dtype_holds_them(product, tmp_path):
    """fp16 is the default; files of earlier code have fp32, and are read as they are."""
    sizes = {}
    for dtype, precision in (("fp16", torch.float16), ("fp32", torch.float32)):
        cfg, state, plan = product(control_dtype=dtype)
        path = tmp_path / dtype
        path.write_bytes(encode_artifact(cfg, quantised(cfg, state, plan)))
        sizes[dtype] = path.stat().st_size
        _, read = read_artifact(path)
        for name in ("skip_weights", "blocks.0.resid_mix", "blocks.1.attn.q_gain", "smear.gate"):
            assert torch.equal(read[name], state[name].to(precision).float())
    assert sizes["fp16"] < sizes["fp32"]
    assert Config().control_dtype == "fp16"


# Kind of tensor, as in QUANT_BITS_MLP: parts of the names
KINDS = {
    "attn": ("attn.c_q.", "attn.c_k.", "attn.c_v.", "attn.proj."),
    "mlp": (".mlp.",),
    "bigram": ("bigram.embed", "bigram.proj", "value_embed.proj"),
    "embed": ("tok_emb", "value_embed.embed"),
}


def of_kind(names, kind: str) -> set[str]:
    return {name for name in names if any(part in name for part in KINDS[kind])}


@pytest.mark.parametrize("kind", KINDS)
def test_a_clip_can_be_chosen_for_one_kind_of_tensor(product, kind):
    """As in #975, whose tables take the quantile and whose matrices the best of five."""
    knobs = {**ALL_ON, "quant_clip": "search5", "keep_float_max_numel": 0}
    before = product(**knobs)[2]
    after = product(**knobs, **{f"quant_clip_{kind}": "amax"})[2]
    changed = {name for name in after if after[name] != before[name]}
    assert changed == of_kind(after, kind) and len(changed) > 1
    assert all(after[name] == before[name]._replace(clip="amax") for name in changed)


def test_a_tensor_of_exactly_the_limit_stays_fp16_and_bits_16_means_fp16(product):
    kept = product(keep_float_max_numel=32 * 32)[2]  # c_q is 32 x 32
    assert kept["blocks.0.attn.c_q.weight"] == torch.float16
    assert isinstance(
        product(keep_float_max_numel=32 * 32 - 1)[2]["blocks.0.attn.c_q.weight"], Grid
    )
    assert product(quant_bits_mlp=16)[2]["blocks.0.mlp.fc.weight"] == torch.float16


# ── damaged files ─────────────────────────────────────────────────────────────────────────────────
def assert_refused(path, tiny) -> str:
    """The line with which scoring this file ends, within 20 s of CPU and without a deadlock;
    anything else fails.
    """

    def too_long(number, _):
        pytest.fail(f"{path} keeps the reader busy: {signal.Signals(number).name}")

    limits = {
        signal.SIGPROF: (signal.ITIMER_PROF, 20),
        signal.SIGALRM: (signal.ITIMER_REAL, HANG),
    }
    previous = {number: signal.signal(number, too_long) for number in limits}
    for timer, seconds in limits.values():
        signal.setitimer(timer, seconds)
    try:
        with pytest.raises(Refusal) as caught:
            main(tiny(eval_only=str(path)))
    finally:
        for number, (timer, _) in limits.items():
            signal.setitimer(timer, 0)
            signal.signal(number, previous[number])
    assert caught.value.code == 2 and "\n" not in str(caught.value)
    return str(caught.value)


def test_a_good_artifact_is_scored(artifact, tiny):
    assert main(tiny(eval_only=str(artifact)))["exit_code"] == 0


def test_a_file_cut_anywhere_is_refused(artifact):
    data = artifact.read_bytes()
    for length in [*range(HEADER.size + 2), *range(0, len(data), 97), len(data) - 1]:
        artifact.write_bytes(data[:length])
        with pytest.raises(Refusal, match=r"artifact\.bin"):
            read_artifact(artifact)


def test_a_flipped_bit_anywhere_is_refused(artifact):
    data = artifact.read_bytes()
    for place in [*range(HEADER.size), *range(HEADER.size, len(data), 97), len(data) - 1]:
        damaged = bytearray(data)
        damaged[place] ^= 1 << place % 8
        artifact.write_bytes(damaged)
        with pytest.raises(Refusal, match=r"artifact\.bin"):
            read_artifact(artifact)
            pytest.fail(f"byte {place} may be anything")


@pytest.mark.parametrize(
    "change, problem",
    [
        (lambda d: b"PK\3\4" + d[4:], "GOLFGPT"),
        (lambda d: d[:8] + b"\1\0" + d[10:], "version 1"),
        (lambda d: d[:10] + b"\6" + d[11:], "compressor 6"),
        (lambda d: d + b"!", "checksum"),
        (lambda d: b"", "GOLFGPT"),
    ],
    ids=["magic", "version", "compressor", "tail", "empty"],
)
def test_the_refusal_says_what_is_wrong(artifact, tiny, change, problem):
    artifact.write_bytes(change(artifact.read_bytes()))
    message = assert_refused(artifact, tiny)
    assert problem in message and str(artifact) in message


def test_a_folder_or_a_missing_file_is_refused(artifact, tiny):
    assert str(artifact.parent) in assert_refused(artifact.parent, tiny)
    assert "none.bin" in assert_refused(artifact.with_name("none.bin"), tiny)


# ── hostile files: the checksum is right ──────────────────────────────────────────────────────────
def forge(
    path, raw: bytes, size: int | None = None, compressor: str = "zlib", blob: bytes | None = None
):
    """Writes an artifact of this payload with a true checksum, perhaps with a false size."""
    blob = COMPRESSORS[compressor].compress(raw, 1) if blob is None else blob
    number, size = list(COMPRESSORS).index(compressor), len(raw) if size is None else size
    path.write_bytes(
        HEADER.pack(MAGIC, FORMAT_VERSION, number, size, hashlib.sha256(blob).digest()) + blob
    )
    return path


def payload(artifact) -> tuple[dict, dict]:
    """(tensors, configuration) inside a good artifact."""
    raw = COMPRESSORS["zstd"].decompress(artifact.read_bytes()[HEADER.size :], MAX_RAW_BYTES)
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return safetensors.torch.load(raw), json.loads(header["__metadata__"]["facts"])


def brotli_stream() -> SimpleNamespace:
    stream = brotli.Compressor(quality=5)
    return SimpleNamespace(compress=stream.process, flush=stream.finish)


COMPRESS_STREAM = {
    "zlib": lambda: zlib.compressobj(9),
    "zstd": lambda: zstandard.ZstdCompressor().compressobj(),
    "lzma": lambda: lzma.LZMACompressor(preset=0),
    "brotli": brotli_stream,
    "ans": brotli_stream,
}


@pytest.mark.parametrize("claimed", [4096, MAX_RAW_BYTES + 1, 2**63])
@pytest.mark.parametrize("compressor", CHOICES)
def test_a_decompression_bomb_is_refused_in_little_memory(artifact, tiny, compressor, claimed):
    stream, million = COMPRESS_STREAM[compressor](), bytes(1 << 20)
    blob = b"".join([stream.compress(million) for _ in range(128)] + [stream.flush()])
    forge(artifact, b"", claimed, compressor, blob)
    tracemalloc.start()
    try:
        assert_refused(artifact, tiny)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("compressor", COMPRESSORS)
@pytest.mark.parametrize("lie", [-1, 1, 10**8])
def test_a_wrong_size_is_refused(artifact, tiny, compressor, lie):
    raw = safetensors.torch.save(
        *map(dict, [payload(artifact)[0], {"facts": json.dumps(payload(artifact)[1])}])
    )
    assert main(tiny(eval_only=str(forge(artifact, raw, None, compressor))))["exit_code"] == 0
    assert_refused(forge(artifact, raw, len(raw) + lie, compressor), tiny)


def long_header(n: int) -> bytes:
    return n.to_bytes(8, "little")


@pytest.mark.parametrize(
    "raw",
    [
        b"nothing at all",
        bytes(64),
        long_header(2) + b"{}",
        long_header(2**63) + b"{}",
        long_header(99) + b"{}",
        long_header(9) + b"not json!",
        long_header(20_000) + b"[" * 20_000,
        long_header(23) + b'{"__metadata__":{"a":1}}',
        long_header(54) + b'{"w":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}' + bytes(4),
    ],
    ids=[
        "text",
        "zeros",
        "no config",
        "huge header",
        "cut header",
        "not json",
        "deep json",
        "metadata",
        "offsets",
    ],
)
def test_a_bad_safetensors_payload_is_refused(artifact, tiny, raw):
    assert_refused(forge(artifact, raw), tiny)


FC, Q, SKIP = "blocks.1.mlp.fc.weight", "blocks.0.attn.c_q.weight", "skip_weights"
TENSORS = {
    "a tensor is missing": lambda t: t.pop(SKIP),
    "its codes are missing": lambda t: t.pop(FC + ":codes"),
    "its scale is missing": lambda t: t.pop(FC + ":scale"),
    "a name is unknown": lambda t: t.update(evil=torch.zeros(3)),
    "a scale has no codes": lambda t: t.update({"evil:scale": torch.zeros(3)}),
    "a tensor is there twice": lambda t: t.update({FC: torch.zeros(96, 32)}),
    "a shape is wrong": lambda t: t.update({SKIP: t[SKIP].T.contiguous()}),
    "the codes have a wrong shape": lambda t: t.update(
        {FC + ":codes": t[FC + ":codes"].T.contiguous()}
    ),
    "the codes are no integers": lambda t: t.update(
        {FC + ":codes": t[FC + ":codes"].float() + 0.5}
    ),
    "a scale per column": lambda t: t.update({Q + ":scale": t[Q + ":scale"].T.contiguous()}),
    "a scale per weight": lambda t: t.update(
        {Q + ":scale": torch.ones(32, 32, dtype=torch.float16)}
    ),
    "a scale that blows the tensor up": lambda t: t.update(
        {
            FC + ":codes": torch.zeros(6_000, 1, dtype=torch.int8),
            FC + ":scale": torch.ones(1, 6_000).half(),
        }
    ),
    "a weight is not a number": lambda t: t.update({SKIP: torch.full_like(t[SKIP], math.nan)}),
    "a scale is infinite": lambda t: t.update(
        {FC + ":scale": torch.full_like(t[FC + ":scale"], math.inf)}
    ),
}


@pytest.mark.parametrize("change", TENSORS.values(), ids=TENSORS)
def test_other_tensors_than_the_configuration_asks_for_are_refused(artifact, tiny, change):
    tensors, config = payload(artifact)
    change(tensors)
    assert_refused(
        forge(artifact, safetensors.torch.save(tensors, {"facts": json.dumps(config)})), tiny
    )


CONFIGS = [
    dict(num_layers=3.0),
    dict(num_layers="3"),
    dict(num_layers=None),
    dict(num_layers=[3]),
    dict(num_layers=2),
    dict(num_layers=0),
    dict(num_layers=-1),
    dict(num_layers=2**40),
    dict(num_layers=1000),
    dict(model_dim=2**40),
    dict(model_dim=65536),
    dict(vocab_size=384.0),
    dict(vocab_size=385),
    dict(bigram_vocab_size=2**40),
    dict(train_seq_len=2**40),
    dict(eval_seq_len=2**40),
    dict(mlp_mult=1e300),
    dict(mlp_mult=math.nan),
    dict(mlp_mult="3"),
    dict(ve_layers=5),
    dict(ve_enabled=True, ve_layers=None),
    dict(smear_gate="yes"),
    dict(smear_gate=2),
    dict(parallel_final_lane="gelu"),
    dict(parallel_final_lane=["mean"]),
    dict(init={}),
    dict(rope_dims=7),
    dict(rope_base="x"),
    dict(logit_softcap=math.inf),
    dict(eval_stride=65),
    dict(eval_stride=1.5),
    dict(ttt_mode="slot"),
    dict(surprise=1),
    dict(given=["MODEL_DIM"]),
    dict(data_path="/"),
    dict(seed=1),
]


@pytest.mark.parametrize("change", CONFIGS, ids=str)
def test_a_hostile_configuration_is_refused(artifact, tiny, change):
    tensors, config = payload(artifact)
    assert_refused(
        forge(
            artifact, safetensors.torch.save(tensors, {"facts": json.dumps({**config, **change})})
        ),
        tiny,
    )


@pytest.mark.parametrize(
    "config", ["", "null", "[]", "3", '"text"', "{}", "[[1, 2]]", '{"num_layers": 3}', "{" * 5000]
)
def test_a_configuration_that_lacks_knobs_is_refused(artifact, tiny, config):
    assert_refused(
        forge(artifact, safetensors.torch.save(payload(artifact)[0], {"facts": config})), tiny
    )


# ── sizes by kind of tensor ───────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("compressor", CHOICES)
def test_group_sizes_count_every_parameter_once_with_its_bytes_and_its_error(product, compressor):
    knobs = dict(compressor=compressor, quant_clip="amax", control_dtype="fp32")
    cfg, state, plan = product(**ALL_ON, **knobs)
    model = GPT(cfg)
    groups = sizes_by_kind(cfg, model, state, quantised(cfg, state, plan))
    assert groups.keys() == {"mlp", "attn", "bigram", "embed", "control"}
    members = {kind: of_kind(state, kind) for kind in KINDS}
    members["control"] = state.keys() - set().union(*members.values())
    for kind, names in members.items():
        squares = sum(
            ((as_shipped(state[n], plan[n]).double() - state[n].double()) ** 2).sum().item()
            for n in sorted(names)
        )
        count = sum(state[n].numel() for n in names)
        assert (groups[kind]["tensors"], groups[kind]["params"]) == (len(names), count)
        assert groups[kind]["rms_error"] == pytest.approx(math.sqrt(squares / count), rel=1e-5)
        facts = cfg.knobs("model", "eval")
        stored = {}
        for n in names:
            codes, scale = plan[n].quantise(state[n]) if isinstance(plan[n], Grid) else (None, None)
            stored |= (
                {n + ":codes": codes, n + ":scale": scale}
                if codes is not None
                else {n: state[n].to(plan[n])}
            )
        assert groups[kind]["bytes"] == len(encode_container(stored, facts, compressor, 1))
    assert (
        sum(g["tensors"] for g in groups.values()) == len(state)
        and groups["control"]["rms_error"] == 0
    )
    assert sum(g["params"] for g in groups.values()) == sum(p.numel() for p in model.parameters())


def test_group_sizes_follow_the_bits_of_each_kind_and_are_in_the_result(product, tiny):
    groups = {
        bits: sizes_by_kind(cfg, GPT(cfg), state, quantised(cfg, state, plan))
        for bits in (4, 6, 8, 16)
        for cfg, state, plan in [product(quant_bits_mlp=bits)]
    }
    sizes, errors = (
        [groups[bits]["mlp"][key] for bits in (4, 6, 8, 16)] for key in ("bytes", "rms_error")
    )
    assert sizes == sorted(set(sizes)) and errors == sorted(set(errors), reverse=True)
    assert len({json.dumps(g["attn"]) for g in groups.values()}) == 1
    report = main(tiny())
    assert sum(g["params"] for g in report["groups"].values()) == report["params"]


# ── one container ─────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_what_is_unsealed_is_exactly_what_was_sealed(tmp_path, compressor):
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.arange(7, dtype=torch.int8),
        "c": torch.randn(4).bfloat16(),
        "d": torch.randn(4, 6).half().T,
    }
    facts = {"config": {"text": "\u00e4\n", "number": 0.1}, "list": [1, None, True]}
    path = tmp_path / "sealed"
    path.write_bytes(encode_container(tensors, facts, compressor))
    found, read = read_container(path)
    assert found == facts and read.keys() == tensors.keys()
    assert all(read[n].dtype == t.dtype and torch.equal(read[n], t) for n, t in tensors.items())


def odd_tensors() -> dict[str, torch.Tensor]:
    """Of every type that a file holds, of odd shapes, with names that JSON escapes."""
    tensors = {
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 3),
        '\u00e9\n\x01\x7f"/': torch.ones(1),
    }
    for i, kind in enumerate(train_gpt.FILE_TYPES):
        for name in (f"a{i}", f"Z{-i}"):
            tensors[name] = torch.arange(2 * i + 3).to(kind)
    return tensors


def test_the_payload_is_byte_for_byte_that_of_safetensors_and_copies_no_tensor():
    tensors = odd_tensors()
    facts = {"text": "\u00e4\n", "number": 0.1, "list": [1, None, True]}
    pieces = train_gpt.container(tensors, facts, "none")
    file = safetensors.torch.save(tensors, {"facts": json.dumps(facts)})
    assert b"".join(pieces[1:]) == file
    # Behind the two headers: the memory of the tensors itself
    found = {piece.__array_interface__["data"][0] for piece in pieces[2:] if len(piece)}
    assert found == {t.data_ptr() for t in tensors.values() if t.numel()}


# ── pruning ───────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("limit", [16, 512])  # at 16 there are large vectors too
@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.3, 0.9])
def test_pruning_zeroes_the_smallest_weights_of_each_large_matrix_and_nothing_else(
    product, fraction, limit
):
    cfg, state, _ = product(prune_pct=fraction, keep_float_max_numel=limit, **ALL_ON)
    pruned, large = prune(cfg, state, fraction), set()
    for name, w in state.items():
        zeroed = pruned[name] == 0
        assert torch.equal(pruned[name][~zeroed], w[~zeroed])
        if w.ndim == 2 and w.numel() > cfg.keep_float_max_numel:
            large.add(name)
            assert zeroed.sum() == math.ceil(fraction * (w.numel() - 1))
            assert fraction == 0 or w[zeroed].abs().max() <= w[~zeroed].abs().min()
        else:
            assert torch.equal(pruned[name], w)
    assert {"tok_emb", "bigram.embed", FC} <= large and (SKIP in large) == (limit < 32)


# ── the cap ───────────────────────────────────────────────────────────────────────────────────────
def code_and_artifact(report: dict) -> tuple[int, int]:
    """Bytes of the two files that ship, from the disk."""
    folder = train_gpt.Path(report["artifact_path"]).parent
    return (folder / PACKED_NAME).stat().st_size, (folder / "artifact.bin").stat().st_size


def test_the_sizes_that_are_reported_are_those_of_the_files_on_disk(tiny):
    cfg = tiny()
    report = main(cfg)
    code, artifact = code_and_artifact(report)
    assert (report["code_bytes"], report["artifact_bytes"], report["total_bytes"]) == (
        code,
        artifact,
        code + artifact,
    )
    log = (train_gpt.Path(cfg.logs_dir) / cfg.run_id / "train.log").read_text()
    rows = {line.split("  ")[0]: line.split()[-1] for line in log.splitlines() if line}
    assert rows["code as shipped"] == f"{code:,}" and rows["artifact"] == f"{artifact:,}"
    assert (
        rows["total"] == f"{code + artifact:,}"
        and rows["headroom"] == f"{16_000_000 - code - artifact:,}"
    )
    assert f"{code + artifact:,} bytes in all, exit code 0" in log


@pytest.mark.parametrize("below", [1, 100_000])
def test_over_the_cap_all_is_saved_and_the_exit_code_is_3(tiny, below):
    total = main(tiny())["total_bytes"]
    assert main(tiny(cap_bytes=total))["exit_code"] == 0
    cfg = tiny(cap_bytes=total - below)
    report = main(cfg)
    assert (
        report["exit_code"] == 3
        and not report["under_cap"]
        and sum(code_and_artifact(report)) == total
    )
    folder = train_gpt.Path(cfg.logs_dir) / cfg.run_id
    assert (
        read_artifact(folder / "artifact.bin")
        and json.loads((folder / "result.json").read_text())["exit_code"] == 3
    )
    log = (folder / "train.log").read_text()
    assert any(line.split() == ["OVER", "CAP", "BY", f"{below:,}"] for line in log.splitlines())


@pytest.mark.parametrize("start, compressor", [(0.75, "zlib"), (0.8, "ans")])
def test_fit_to_cap_takes_the_first_step_of_half_a_percent_that_fits(
    product, tiny, monkeypatch, start, compressor
):
    """Each artifact of these weights is made once: every cap meets the same ones."""
    made_before = {}

    def encode_once(coder, parts, **options) -> bytes:
        zeros = sum(int((part == 0).sum()) for tensor in parts.values() for part in tensor.values())
        key = (coder.compressor, coder.compress_level, zeros)
        if key not in made_before:
            made_before[key] = encode_artifact(coder, parts, **options)
        return made_before[key]

    monkeypatch.setattr(train_gpt, "encode_artifact", encode_once)
    knobs = dict(prune_pct=start, keep_float_max_numel=64, compressor=compressor, compress_level=6)
    cfg, state, plan = product(**knobs)
    code, steps = len(train_gpt.shipped_code(cfg)), round((0.9 - start) / 0.005)

    def size(coder, share: float) -> int:
        return code + len(encode_once(coder, quantised(cfg, prune(cfg, state, share), plan)))

    ans = dataclasses.replace(cfg, compressor="ans", compress_level=-1)
    smaller = cfg if compressor == "ans" else min(cfg, ans, key=lambda coder: size(coder, start))
    tries = (
        [(cfg, start)]
        + [(ans, start)] * (compressor != "ans")
        + [(smaller, start + i * 0.005) for i in range(1, steps)]
    )
    sizes = [size(*what) for what in tries]
    jumps = [
        small for small, next_one in itertools.pairwise(sizes) if next_one > small
    ]  # more zeros can be a larger file
    firsts = set()
    for cap in (
        sizes[:2]
        + [code + int(share * (min(sizes[:2]) - code)) for share in (0.99, 0.9, 0.8)]
        + jumps
    ):
        firsts.add(first := next(i for i, size in enumerate(sizes) if size <= cap))
        cfg = tiny(**knobs, fit_to_cap=True, cap_bytes=cap)
        made = export(cfg, Run(cfg), state, plan)
        assert made.total == code + len(made.blob) == sizes[first]
        assert made.pruned == pytest.approx(tries[first][1])
        assert HEADER.unpack_from(made.blob)[2] == list(COMPRESSORS).index(
            tries[first][0].compressor
        )
        assert made.cfg.compressor == tries[first][0].compressor
    assert 0 in firsts and (1 in firsts) == (sizes[1] < sizes[0]) and max(firsts) > 4


def test_only_rank_0_prunes_and_packs(product, monkeypatch):
    def never(*_):
        raise AssertionError("another rank did the work of rank 0")

    cfg, state, plan = product(prune_pct=0.5)
    run = Run(cfg)
    run.rank = 1
    for name in ("prune", "quantised", "encode_artifact", "shipped_code"):
        monkeypatch.setattr(train_gpt, name, never)
    assert export(cfg, run, state, plan).blob == b""


def test_fit_to_cap_fits_and_says_what_it_costs(tiny):
    total = main(tiny(compressor="ans", compress_level=-1))["total_bytes"]
    assert main(tiny(fit_to_cap=True, cap_bytes=total))["pruned"] == 0  # the other coder is enough
    report = main(tiny(fit_to_cap=True, cap_bytes=total - 250))
    assert (
        report["exit_code"] == 0
        and sum(code_and_artifact(report)) <= total - 250
        and report["pruned"] > 0
    )
    assert report["codes"]["compressor"] == "ans" and report["config"]["compressor"] == "zstd"
    bpb = {name: score["bpb"] for name, score in report["scores"].items()}
    assert report["fit_cost_bpb"] == bpb["quantised"] - bpb["unfitted"] != 0
    row = report["toggles"]["PRUNE_PCT"]
    assert row["active"] and row["scope"] == f"export, {report['pruned']:.1%}"


def test_fit_to_cap_prunes_nothing_where_it_fits_and_says_so_where_it_cannot(tiny):
    fits, cannot = (
        main(tiny(fit_to_cap=True)),
        main(tiny(fit_to_cap=True, cap_bytes=1000, prune_pct=0.88)),
    )
    assert fits["exit_code"] == 0 and fits["pruned"] == 0 and fits["fit_cost_bpb"] is None
    assert cannot["exit_code"] == 3 and code_and_artifact(cannot)[1] == cannot["artifact_bytes"]


# ── the file ──────────────────────────────────────────────────────────────────────────────────────
def test_writing_replaces_the_file_and_leaves_no_other(tmp_path):
    path = tmp_path / "a.bin"
    for data in (b"first", b"second"):
        write_atomic(path, data)
        assert path.read_bytes() == data and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("call", ["os.fsync", "pathlib.Path.replace"])
@pytest.mark.parametrize("old", [None, b"old"])
def test_a_write_that_fails_leaves_what_was_there_and_no_part_of_the_new(
    tmp_path, monkeypatch, call, old
):
    path = tmp_path / "a.bin"
    if old:
        path.write_bytes(old)
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(call, fail)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, b"new" * 1000)
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_nothing_is_pickled():
    tree = ast.parse(train_gpt.SOURCE)
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {
        ast.unparse(node) for node in ast.walk(tree) if isinstance(node, (ast.Attribute, ast.Name))
    }
    names |= {alias.name for node in imports for alias in node.names}
    assert not names & {
        "pickle",
        "dill",
        "joblib",
        "marshal",
        "shelve",
        "torch.load",
        "torch.save",
        "eval",
        "exec",
    }
    assert "safetensors.torch.load" in names


# ── What no artifact holds ────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    "knobs, tensor, remedy",
    [
        (dict(tied_embed_lr=1e6), "tok_emb", "lower TIED_EMBED_LR=1e+06"),
        (dict(tied_embed_lr=1e6, keep_float_max_numel=10**6), "tok_emb", "lower TIED_EMBED_LR"),
        (dict(matrix_lr=1e8), "attn.c_q.weight", "lower MATRIX_LR=1e+08"),
        (dict(scalar_lr=1e6), "skip_weights", "lower SCALAR_LR=1e+06"),
    ],
    ids=["a grid", "fp16", "matrices", "gains"],
)
def test_weights_beyond_fp16_end_the_run_before_an_artifact_is_written(tiny, knobs, tensor, remedy):
    """They were written as inf, and then "not one of our files, or damaged" (exit code 2)."""
    cfg = tiny(iterations=3, warmdown_iters=0, eval_stride=0, **knobs)
    with pytest.raises(Refusal) as refused:
        main(cfg)
    line = str(refused.value)
    assert refused.value.code == 5 and remedy in line
    assert tensor in line and "beyond what fp16 holds (65,504" in line
    folder = Path(cfg.logs_dir) / cfg.run_id
    assert not (folder / "artifact.bin").exists() and (folder / "checkpoint.bin").exists()


@pytest.mark.parametrize("how", [torch.float16, Grid(8), Grid(6, "search5")], ids=str)
def test_the_largest_weights_that_fp16_holds_are_shipped(how):
    top = how.top if isinstance(how, Grid) else 1
    model = SimpleNamespace(get_parameter=lambda name: SimpleNamespace(role=EMBED_ROLE))

    def problem(largest: float) -> str:
        state = {"w": torch.tensor([[largest * top, -largest * top]])}
        try:
            train_gpt.refuse_what_no_artifact_holds(Config(), model, state, {"w": how})
        except Refusal as refusal:
            return str(refusal)
        return ""

    assert problem(65_504.0) == ""
    for broken in (65_520.0, math.inf, math.nan):
        assert problem(broken).startswith("w: 2 of 2 weights, up to ")
