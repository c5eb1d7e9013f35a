"""Which rows a step takes from the shards: one order for each LOADER.

Expected places come from the records' own loaders (tests/golden), or follow from the promise that a
step holds the same rows on any number of ranks.
"""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import write_shard

import train_gpt
from train_gpt import (
    BOS,
    LOADERS,
    ORDERS,
    CoprimeRows,
    CoprimeWalk,
    Loader,
    Refusal,
    ShuffledRows,
    Shuffler,
    Split,
    StepShape,
    document_pieces,
    longest_row,
    step_shape,
)

GOLDEN = Path(__file__).parent / "golden"
PACKER = json.loads((GOLDEN / "loader.json").read_text())
COPRIME = json.loads((GOLDEN / "coprime.json").read_text())
DRAWN = ("shuffled", "coprime")


def config(folder: Path, **knobs) -> train_gpt.Config:
    if knobs.get("loader") == "documents":
        knobs["doc_mask"] = True
    return train_gpt.Config(data_path=str(folder), vocab_size=65536, eval_stride=1, **knobs)


def rank_of(world: int, rank: int) -> SimpleNamespace:
    return SimpleNamespace(world=world, rank=rank, cuda=False, device=torch.device("cpu"))


def numbered(folder: Path, sizes: list[int]) -> Path:
    """Shards in which each token is its own place in the stream."""
    place = 0
    for shard, size in enumerate(sizes):
        write_shard(folder / f"fineweb_train_{shard:06d}.bin", range(place, place + size))
        place += size
    return folder


def documents_in(folder: Path) -> Path:
    """The shards of loader.json: 2 + 1000 * shard + place, but BOS where a document begins."""
    for shard, about in enumerate(PACKER["shards"]):
        tokens = 2 + 1000 * shard + np.arange(about["tokens"])
        tokens[np.cumsum([about["lead"], *about["docs"]])[:-1]] = BOS
        write_shard(folder / f"fineweb_train_{shard:06d}.bin", tokens)
    return folder


def read(cfg, world: int, lengths: list[int], done: list[int] = ()) -> list[torch.Tensor]:
    """The targets of each step, the rows of all ranks together; inputs lie one place before."""
    split = Split(cfg, "train")
    ranks = [Loader(cfg, rank_of(world, rank), split, done) for rank in range(world)]
    steps = []
    for length in lengths:
        ids, targets = zip(*(rank.next(length) for rank in ranks), strict=True)
        assert torch.equal(torch.cat(ids)[:, 1:], torch.cat(targets)[:, :-1])
        steps.append(torch.cat(targets))
    for rank in ranks:
        rank.close()
    return steps


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# ── The records' own places ──
@pytest.mark.parametrize("case", PACKER["cases"])
def test_documents_are_packed_as_in_1855(tmp_path, case):
    """With several micro-batches until a shard ends: there theirs depends on the ranks."""
    world, accumulate = case["world_size"], case["grad_accum"]
    cfg = config(
        documents_in(tmp_path),
        loader="documents",
        train_batch_tokens=case["global_tokens"],
        grad_accum_steps=accumulate,
        train_seq_len=2,
    )
    expected = {}
    for batch in case["batches"]:
        first = 3 + 1000 * batch["shard"] + batch["start"]
        expected.setdefault(batch["step"], []).append(first)
    if accumulate > 1:
        expected = {0: expected[0]}
    steps = read(cfg, world, [1] * len(expected))
    for step, targets in enumerate(steps):
        assert targets.shape == (world * accumulate, case["batches"][0]["inputs"])
        # the first target of a row is never a BOS here
        assert targets[:, 0].tolist() == sorted(expected[step])


@pytest.mark.parametrize("case", PACKER["cases"])
def test_the_masks_of_packed_documents_are_those_of_1855(tmp_path, case):
    """DOC_MASK finds in the ids alone what theirs finds while it packs."""
    split = Split(config(documents_in(tmp_path)), "train")
    for batch in case["batches"]:
        ids = split.take(split.edges[batch["shard"]] + batch["start"], batch["inputs"])
        first = document_pieces(torch.from_numpy(ids)[None], case["max_segment"]).first
        assert [*first.unique().tolist(), batch["inputs"]] == batch["boundaries"]


@pytest.mark.parametrize("case", PACKER["shuffled"])
def test_rows_are_shuffled_as_in_1855(tmp_path, monkeypatch, case):
    split = Split(config(documents_in(tmp_path)), "train")
    world, rows = case["world_size"], case["rows_per_step"]
    monkeypatch.setattr(ShuffledRows, "READERS", world)
    shape = StepShape(world * rows, 1, rows, case["seq_len"])
    own = range(case["rank"] * rows, (case["rank"] + 1) * rows)
    order = ShuffledRows(split, shape, own, 0)
    for step in range(3):
        expected = [split.edges[shard] + at for n, (shard, at) in case["windows"] if n == step]
        assert order.starts(step) == expected


@pytest.mark.parametrize("case", COPRIME["cases"])
def test_shards_are_walked_as_in_1060(tmp_path, case):
    split = Split(config(numbered(tmp_path, case["shards"])), "train")
    rows = case["rows"]
    order = CoprimeRows(split, StepShape(rows, 1, rows, case["length"]), range(rows), 0)
    assert [order.starts(step) for step in range(len(case["starts"]))] == case["starts"]


def test_more_shards_are_mixed_as_training_goes_on_as_in_1060(tmp_path):
    case = COPRIME["late"]
    split = Split(config(numbered(tmp_path, case["shards"])), "train")
    rows = case["rows"]
    order = CoprimeRows(split, StepShape(rows, 1, rows, case["length"]), range(rows), 0)
    for step, starts in case["late"].items():
        assert order.starts(int(step)) == starts
    for step, shards in ((900, 8 + (48 - 8) // 2), (1800, 48), (9000, 48)):
        order.drawn = step
        assert len(order.choose()) == shards


# ── The same rows on any number of ranks, and after a restart ──
def stream(tmp_path: Path, loader: str, **knobs) -> train_gpt.Config:
    """Nine shards of several lengths, each of which begins with a document; 8 rows of 16 tokens."""
    place = 2
    for shard, size in enumerate([300, 481, 177, 500, 264, 333, 410, 290, 350]):
        tokens = np.arange(place, place + size)
        tokens[::53] = BOS
        write_shard(tmp_path / f"fineweb_train_{shard:06d}.bin", tokens)
        place += size
    return config(tmp_path, **dict(train_seq_len=16, train_batch_tokens=128) | knobs, loader=loader)


@pytest.mark.parametrize("loader", LOADERS)
def test_a_step_holds_the_same_rows_on_any_number_of_ranks(tmp_path, loader):
    """Over two epochs, so at each shard's end, too: 3105 tokens, 128 a step."""
    alone = read(stream(tmp_path, loader, grad_accum_steps=8), 1, [16] * 50)
    for world, accumulate in ((2, 4), (4, 2), (8, 1)):
        cfg = stream(tmp_path, loader, grad_accum_steps=accumulate)
        assert same(alone, read(cfg, world, [16] * 50))


def test_three_ranks_hold_the_same_rows_as_one(tmp_path):
    for loader in ("rows", *DRAWN):
        cfg = stream(tmp_path, loader)
        assert same(read(cfg, 1, [16] * 9), read(cfg, 3, [16] * 9))


def test_a_slice_of_documents_is_a_micro_batch(tmp_path):
    """Two ranks of one micro-batch are one rank of two; one rank of one cuts the text nowhere."""
    alone = read(stream(tmp_path, "documents"), 1, [16])[0]
    two = read(stream(tmp_path, "documents"), 2, [16])[0]
    assert torch.equal(two, read(stream(tmp_path, "documents", grad_accum_steps=2), 1, [16])[0])
    assert alone.shape == (1, 128) and two.shape == (2, 64)
    # the first target of a row follows the last one of the row before
    assert torch.equal(alone[0, :64], two[0]) and torch.equal(alone[0, 65:], two[1, :-1])


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("done", [7, 12], ids=["before", "after"])
def test_a_run_goes_on_where_it_ended(tmp_path, loader, done):
    """Ten steps of short rows, then long ones."""
    lengths = [16] * 10 + [32] * 9
    cfg = stream(tmp_path, loader)
    assert same(read(cfg, 2, lengths)[done:], read(cfg, 2, lengths[done:], lengths[:done]))


@pytest.mark.parametrize("loader", ("rows", *DRAWN))
def test_a_new_length_drops_what_was_read_ahead(tmp_path, loader):
    """Each step is of the length that is asked for; with the first one again, other rows come."""
    steps = read(stream(tmp_path, loader), 1, [16, 16, 64, 16])
    assert [tuple(step.shape) for step in steps] == [(8, 16), (8, 16), (2, 64), (8, 16)]
    if loader == "rows":
        starts = np.array([0, 3105 // 2]) + 2 * 64
        assert (steps[2][:, 0] - 3).tolist() == starts.tolist()
    else:
        assert not torch.equal(steps[0], steps[3])


def test_a_step_is_dealt_in_micro_batches_that_a_graph_is_compiled_for(tmp_path):
    """(rows of all ranks, micro-batches, rows of one, tokens of a row)"""
    cfg = stream(tmp_path, "documents", grad_accum_steps=4)
    assert step_shape(cfg, rank_of(2, 1), 16) == (8, 4, 1, 16)
    cfg = stream(tmp_path, "rows", grad_accum_steps=2)
    assert step_shape(cfg, rank_of(3, 0), 16) == (8, 2, 2, 16)  # 3 rows in 2 micro-batches
    assert step_shape(cfg, rank_of(3, 2), 16) == (8, 2, 1, 16)
    assert step_shape(cfg, rank_of(3, 2), 32) == (4, 1, 1, 32)
    on_gpu = SimpleNamespace(world=2, rank=0, cuda=True)
    assert step_shape(stream(tmp_path, "documents"), on_gpu, 16) == (8, 4, 1, 16)


def test_a_micro_batch_that_holds_no_whole_row_is_refused_where_it_trains(tmp_path):
    """Documents would be cut at its end, and TRAIN_SEQ_LEN and the growing rows do nothing."""
    cfg = stream(tmp_path, "documents", grad_accum_steps=8, train_seq_len=17)
    with pytest.raises(Refusal) as caught:
        step_shape(cfg, rank_of(1, 0), 16)
    said = str(caught.value)
    for word in ("TRAIN_BATCH_TOKENS=128", "GRAD_ACCUM_STEPS=8", "TRAIN_SEQ_LEN=17", "16 tokens"):
        assert word in said
    assert longest_row(dataclasses.replace(cfg, eval_only="artifact.bin"), rank_of(1, 0)) == 17


# ── Epochs ──
def rows_of(cfg, steps: int) -> list[int]:
    split = Split(cfg, "train")
    shape = step_shape(cfg, rank_of(1, 0), cfg.train_seq_len)
    order = ORDERS[cfg.loader](split, shape, range(shape.step_rows), 0)
    return [start for step in range(steps) for start in order.starts(step)]


def test_a_reader_gives_each_row_once_and_then_shuffles_again(tmp_path):
    split = Split(config(numbered(tmp_path, [65, 49])), "train")
    reader = Shuffler(split, [0, 1], 8, [0])
    epochs = []
    for _ in range(2):
        rows = [row.tolist() for row in reader.rows]
        epochs.append(reader.draw(sum(map(len, rows))))
        assert sorted(epochs[-1]) == sorted(rows[0] + rows[1])
        for row, end in zip(rows, (65, 65 + 49), strict=True):
            # end to end, and nothing is left out but what is at the shard's ends
            assert sorted(row) == [*range(min(row), end - 8, 8)] and row != sorted(row)
        assert min(rows[0]) < 8 and 65 <= min(rows[1]) < 65 + 8
        # what the next draw would do
        assert not reader.left.any()
        reader.shuffle()
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("count", [1, 2, 3, 12, 97])
def test_a_walk_visits_each_row_of_a_shard_once(tmp_path, count):
    split = Split(config(numbered(tmp_path, [8 * count + 1])), "train")
    walk = CoprimeWalk(np.random.default_rng(3), split, 0, 8)
    visited = [walk.next() for _ in range(walk.left)]
    assert sorted(visited) == [*walk.rows] and walk.left == 0
    assert len(visited) in (count, max(count - 1, 1))


def test_an_epoch_of_documents_is_every_span_that_fits(tmp_path):
    """A shard that holds none is passed over, and the first one comes again after the last."""
    place = 0
    for shard, (lead, size) in enumerate([(3, 40), (0, 12), (1, 30)]):
        tokens = np.arange(place + 2, place + size + 2)
        tokens[lead] = BOS
        write_shard(tmp_path / f"fineweb_train_{shard:06d}.bin", tokens)
        place += size
    cfg = config(tmp_path, loader="documents", train_batch_tokens=12, train_seq_len=12)
    assert rows_of(cfg, 6) == [3, 16, 53, 66, 3, 16]


# ── Refusals ──
def refused(cfg, world: int = 1) -> str:
    """What the first step says."""
    loader = Loader(cfg, rank_of(world, 0), Split(cfg, "train"))
    answer = loader.next(cfg.train_seq_len)
    loader.close()
    assert isinstance(answer, Refusal) and "\n" not in str(answer)
    return str(answer)


@pytest.mark.parametrize("loader", DRAWN)
def test_a_shard_shorter_than_a_row_is_refused(tmp_path, loader):
    numbered(tmp_path, [40, 16, 40])
    cfg = config(tmp_path, loader=loader, train_seq_len=16, train_batch_tokens=32)
    assert "fineweb_train_000001.bin: 16 tokens, shorter than a row of 16" in refused(cfg)
    write_shard(tmp_path / "fineweb_train_000001.bin", range(17))
    assert [tuple(step.shape) for step in read(cfg, 1, [16] * 9)] == [(2, 16)] * 9


def test_shards_without_a_document_or_too_short_for_a_step_are_refused(tmp_path):
    write_shard(tmp_path / "fineweb_train_000000.bin", [5, BOS, *range(9, 20)])
    write_shard(tmp_path / "fineweb_train_000001.bin", [5] * 5000)
    cfg = config(tmp_path, loader="documents", train_batch_tokens=12, train_seq_len=12)
    assert "fineweb_train_000001.bin: no document begins (token 1) among 5,000" in refused(cfg)
    write_shard(tmp_path / "fineweb_train_000001.bin", [5] * 4999 + [BOS])
    assert "none of 2 training shards holds the 13 tokens of a step" in refused(cfg)


def test_documents_in_one_row_need_masks():
    with pytest.raises(Refusal, match="set DOC_MASK=1"):
        train_gpt.Config(loader="documents")


def test_documents_that_do_not_fill_their_micro_batches_are_refused(tmp_path):
    cfg = stream(tmp_path, "documents", grad_accum_steps=3)
    with pytest.raises(Refusal, match="multiple of its 1 ranks x 3 micro-batches"):
        refused(cfg)


def test_fewer_shards_than_readers_are_read_all_the_same(tmp_path):
    """On eight ranks, of one row each."""
    numbered(tmp_path, [200, 100, 150])
    cfg = config(tmp_path, loader="shuffled", train_seq_len=16, train_batch_tokens=128)
    steps = read(cfg, 8, [16] * 3)
    assert same(steps, read(cfg, 1, [16] * 3))
    edges = np.searchsorted([200, 300], torch.cat(steps)[:, 0].numpy(), "right")
    assert set(edges.tolist()) == {0, 1, 2}


def test_byte_counts_beside_training_shards_are_no_shards(tmp_path):
    numbered(tmp_path, [40])
    write_shard(tmp_path / "fineweb_train_bytes_000000.bin", [1] * 40)
    assert Split(config(tmp_path), "train").tokens == 40
