"""From shards to batches, and from tokens to bytes.

Failures that these tests would have caught: bits per byte that were quietly wrong because of the
space byte (#1545, #1576, #1632), a mangled word mark (#144) or another denominator (#897, #2071);
training or scoring on other data than one thought (#2127: 80 % of the validation documents; #2109;
#1334: 80 of 143 shards); documents in both splits (15 of 34 submissions); a shard cut by a broken
download; a batch that depends on the number of ranks.
"""

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
import torch
from conftest import HANG, ROOT, environment, read_shard, write_shard
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare_data
import train_gpt
from train_gpt import (
    BOS,
    ByteTable,
    Config,
    Loader,
    Refusal,
    Split,
    Validation,
    check_data,
    command_line,
    count_tokens,
    main,
)

WORD_MARK = "\u2581"
TRAINER = dict(
    model_type="bpe",
    pad_id=0,
    bos_id=1,
    eos_id=2,
    unk_id=3,
    byte_fallback=True,
    add_dummy_prefix=False,
    normalization_rule_name="nmt_nfkc",
    num_threads=1,
    max_sentence_length=200_000,
    minloglevel=2,
)


def rank_of(world: int, rank: int = 0) -> SimpleNamespace:
    """As much of a Run as the data section needs."""
    return SimpleNamespace(world=world, rank=rank, cuda=False, device=torch.device("cpu"))


def shards_in(folder: Path, *parts, split: str = "val") -> Path:
    for i, tokens in enumerate(parts):
        write_shard(folder / f"fineweb_{split}_{i:06d}.bin", tokens)
    return folder


def refused(action, *arguments) -> str:
    """The one line with which this is refused."""
    with pytest.raises(Refusal) as refusal:
        action(*arguments)
    assert refusal.value.code == 2 and len(str(refusal.value).splitlines()) == 1
    return str(refusal.value)


# ── Shards ────────────────────────────────────────────────────────────────────────────────────────
def header(*numbers: int) -> bytes:
    return np.array([*numbers, *[0] * (256 - len(numbers))], "<i4").tobytes()


def test_a_shard_of_the_challenges_format_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "fineweb_train_000000.bin"
    path.write_bytes(header(20240520, 1, 3) + b"\x01\x00\x02\x01\xff\xff")
    assert count_tokens(path) == 3 and read_shard(path).tolist() == [1, 258, 65535]
    assert Split(Config(data_path=str(tmp_path), vocab_size=65536), "train").take(
        0, 3
    ).tolist() == [1, 258, 65535]


@pytest.mark.parametrize(
    "content, complaint",
    [
        (b"", "no token shard"),
        (b"\x00" * 100, "no token shard"),
        (header(20240521, 1, 2) + b"\0" * 4, "20240521"),
        (header(20240520, 2, 2) + b"\0" * 4, "20240520, 2"),
        (header(20240520, 1, 3) + b"\0" * 5, "promises 3 tokens"),
        (header(20240520, 1, 3) + b"\0" * 8, "promises 3 tokens"),
        (header(20240520, 1, -1), "promises -1 tokens"),
        (header(20240520, 1, 2**31 - 1), "promises 2,147,483,647 tokens"),
        (b"<html>404 Not Found</html>" * 99, "no token shard"),
    ],
    ids=[
        "empty",
        "short",
        "magic",
        "version",
        "cut",
        "too long",
        "negative",
        "only a header",
        "a web page",
    ],
)
def test_a_damaged_shard_is_refused_with_file_and_remedy(tmp_path, content, complaint):
    path = tmp_path / "fineweb_val_000000.bin"
    path.write_bytes(content)
    message = refused(count_tokens, path)
    assert message.startswith(f"{path}: ") and complaint in message and "prepare_data.py" in message


def test_a_token_outside_the_vocabulary_is_refused_with_file_and_id(tmp_path):
    shards_in(tmp_path, [1, 5, 9], [1, 10, 4], split="train")
    split = Split(Config(data_path=str(tmp_path), vocab_size=10), "train")
    assert split.take(0, 4).tolist() == [1, 5, 9, 1]
    message = refused(split.take, 2, 3)
    assert (
        message.startswith(f"{tmp_path / 'fineweb_train_000001.bin'}: token id 10")
        and "VOCAB_SIZE=10" in message
    )


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(lambda sizes: sum(sizes) >= 2),
    start=st.integers(0, 200),
    n=st.integers(1, 60),
)
def test_any_stretch_equals_numpys_of_the_endless_stream(sizes, start, n):
    stream = np.arange(sum(sizes))
    with TemporaryDirectory() as folder:
        shards_in(Path(folder), *np.split(stream, np.cumsum(sizes)[:-1]), split="train")
        split = Split(Config(data_path=folder), "train")
        assert split.tokens == len(stream)
        taken = split.take(start, n)
    assert (
        taken.dtype == np.int64
        and taken.tolist() == stream.take(range(start, start + n), mode="wrap").tolist()
    )


def test_shards_follow_each_other_in_the_order_of_their_names(tmp_path):
    for name, token in (
        ("fineweb_train_000010", 3),
        ("fineweb_train_000002", 2),
        ("other_train_000000", 9),
        ("fineweb_val_000000", 8),
    ):
        write_shard(tmp_path / f"{name}.bin", [token] * 2)
    assert Split(Config(data_path=str(tmp_path)), "train").take(0, 4).tolist() == [2, 2, 3, 3]


# ── Batches ───────────────────────────────────────────────────────────────────────────────────────
def steps(cfg: Config, split: Split, world: int, count: int) -> list[tuple[list, list]]:
    """(rows, targets) of all ranks together, per step."""
    readers = [Loader(cfg, rank_of(world, rank), split) for rank in range(world)]
    taken = [[reader.next(cfg.train_seq_len) for reader in readers] for _ in range(count)]
    for reader in readers:
        reader.close()
    together = []
    for ranks in taken:
        rows, targets = zip(*ranks, strict=True)
        together.append((torch.cat(rows).tolist(), torch.cat(targets).tolist()))
    return together


def stream_of(tokens: int, folder: Path) -> tuple[Config, Split]:
    """8 rows of 16 tokens per step, and a split of the tokens 0, 1, ... in two shards."""
    shards_in(folder, range(tokens // 3), range(tokens // 3, tokens), split="train")
    cfg = Config(data_path=str(folder), train_seq_len=16, train_batch_tokens=128, eval_stride=16)
    return cfg, Split(cfg, "train")


@pytest.fixture
def stream(tmp_path):
    return stream_of(300, tmp_path)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_a_step_covers_the_same_rows_on_any_number_of_ranks(stream, world):
    starts = np.array([0, 37, 75, 112, 150, 187, 225, 262])  # evenly spaced in 300 tokens
    for n, (rows, targets) in enumerate(steps(*stream, world, 4)):
        expected = starts[:, None] + n * 16 + np.arange(16)  # each where its predecessor ended
        assert rows == (expected % 300).tolist()
        assert targets == ((expected + 1) % 300).tolist()  # across rows, shards and the end


@pytest.mark.parametrize("epochs", [1, 2])
def test_an_epoch_sees_every_token_once_as_input_and_once_as_target(tmp_path, epochs):
    for side in zip(*steps(*stream_of(384, tmp_path), 2, 3 * epochs), strict=True):
        assert sorted(np.concatenate(side).ravel()) == sorted([*range(384)] * epochs)


def test_a_rank_reads_whole_rows_as_int64_on_its_device(stream):
    reader = Loader(stream[0], rank_of(4, 3), stream[1])
    ids, targets = reader.next(16)
    assert ids.dtype == targets.dtype == torch.int64 and ids.shape == targets.shape == (2, 16)
    reader.close()


@pytest.mark.parametrize("world", [1, 3, 8])
def test_a_rank_reads_its_own_rows_and_no_others(stream, world, monkeypatch):
    cfg, split = stream
    starts = []
    take = Split.take
    monkeypatch.setattr(Split, "take", lambda *place: starts.append(place[1]) or take(*place))
    for rank in range(world):
        reader = Loader(cfg, rank_of(world, rank), split)
        ids, _ = reader.next(16)
        reader.close()
        read_ahead = np.add.outer([0, 16, 32], ids[:, 0].numpy()).ravel()
        assert starts == read_ahead.tolist()
        starts.clear()


def test_a_bad_token_stops_the_rank_that_reads_it_and_no_other(tmp_path):
    """The others are told by Trainer.step: see test_faults."""
    # In the second half of the first step
    shards_in(tmp_path, [*range(110), 1024, *range(89)], split="train")
    cfg = Config(data_path=str(tmp_path), train_seq_len=16, train_batch_tokens=128, eval_stride=16)
    good, bad = (Loader(cfg, rank_of(2, rank), Split(cfg, "train")) for rank in (0, 1))
    assert len(good.next(16)) == 2
    assert "fineweb_train_000000.bin: token id 1024 at 110, but" in str(bad.next(16))
    good.close()
    bad.close()


# ── Bytes ─────────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture(scope="module")
def foreign(tmp_path_factory) -> Path:
    """A tokenizer of another language, of as many pieces: with pieces of several bytes."""
    model, text = (
        io.BytesIO(),
        [
            "été déjà là où la fée rêve, 東京 の 東京 naïve façade " * 5,
            "l'élève préféré où ça " * 7,
        ],
    )
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_writer=model,
        vocab_size=384,
        hard_vocab_limit=False,
        character_coverage=1.0,
        **TRAINER,
    )
    path = tmp_path_factory.mktemp("foreign") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


def table_of(model: Path) -> tuple[ByteTable, sentencepiece.SentencePieceProcessor]:
    sp = sentencepiece.SentencePieceProcessor(model_file=str(model))
    return ByteTable(Config(tokenizer_path=str(model), vocab_size=sp.vocab_size())), sp


@pytest.mark.parametrize(
    "previous, target, expected",
    [
        ("<s>", "er", 2),
        ("e", "er", 2),
        ("<s>", "▁the", 3),
        ("</s>", "▁the", 3),
        ("<pad>", "▁the", 3),
        ("<unk>", "▁the", 3),
        ("e", "▁the", 4),
        ("▁the", "▁the", 4),
        ("<0x0A>", "▁the", 4),
        ("e", "▁", 1),
        ("<s>", "▁", 0),
        ("e", "<0x0A>", 1),
        ("<s>", "<0xFF>", 1),
        ("<0xE6>", "<0x9D>", 1),
        ("e", "<s>", 0),
        ("e", "</s>", 0),
        ("<s>", "<s>", 0),
        ("e", "<pad>", 0),
        ("e", "<unk>", 0),
    ],
)
def test_the_bytes_of_a_target_are_those_computed_by_hand(data, previous, target, expected):
    table, sp = table_of(data / "tokenizer.model")
    ids = [sp.piece_to_id(piece) for piece in (previous, target)]
    assert [sp.id_to_piece(i) for i in ids] == [previous, target]  # the pieces exist
    assert table.count(np.array(ids)).tolist() == [expected]


@pytest.mark.parametrize("piece, size", [("é", 2), ("東", 3), ("▁", 0), ("'", 1)])
def test_a_piece_counts_its_utf8_bytes_and_not_its_characters(foreign, piece, size):
    table, sp = table_of(foreign)
    assert (
        sp.id_to_piece(sp.piece_to_id(piece)) == piece and table.base[sp.piece_to_id(piece)] == size
    )
    assert table.space[sp.piece_to_id(piece)] == (piece == WORD_MARK)


@settings(deadline=None)
@given(text=st.text(max_size=60))
@pytest.mark.parametrize("which", ["english", "foreign"])
def test_the_bytes_of_any_text_are_its_utf8_length(data, foreign, which, text):
    table, sp = table_of(foreign if which == "foreign" else data / "tokenizer.model")
    tokens = np.array([BOS, *sp.encode(text)])
    assert table.count(tokens).sum() == len(sp.decode(tokens.tolist()).encode())


def test_the_bytes_of_every_document_are_the_utf8_length_of_its_decoded_text(data):
    table, sp = table_of(data / "tokenizer.model")
    tokens = np.array(read_shard(data / "fineweb_val_000000.bin"))
    documents = np.split(tokens, np.flatnonzero(tokens == BOS)[1:])
    assert len(documents) == 8
    assert [table.count(d).sum() for d in documents] == [
        len(sp.decode(d.tolist()).encode()) for d in documents
    ]
    # Each BOS target adds nothing
    assert table.count(tokens).sum() == sum(table.count(d).sum() for d in documents)


@pytest.mark.parametrize("code, ends", [(2, False), (130, True), (143, True)])
def test_rows_that_are_refused_wait_for_the_other_ranks_and_a_stop_signal_does_not(
    stream, code, ends, monkeypatch
):
    """A rank that was stopped must not go into the all-reduce alone."""

    def refuse(*_):
        raise Refusal("no rows", code)

    monkeypatch.setattr(Split, "take", refuse)
    loader = Loader(stream[0], rank_of(1), stream[1])
    if ends:
        with pytest.raises(Refusal) as caught:
            loader.next(16)
        assert caught.value.code == code
    else:
        assert loader.next(16).code == code
    loader.close()


def test_a_table_that_is_wrong_by_one_byte_is_refused_with_the_document(data):
    table, sp = table_of(data / "tokenizer.model")
    tokens = np.array(read_shard(data / "fineweb_val_000000.bin")).astype(np.int64)
    table.verify(tokens)
    table.base[sp.piece_to_id("e")] = 2
    assert "document at token 1 " in refused(table.verify, tokens)


def test_tokens_that_are_no_text_are_refused(data):
    table, sp = table_of(data / "tokenizer.model")
    tokens = np.array([BOS, sp.piece_to_id("e"), BOS, sp.piece_to_id("<0xFF>"), BOS])
    assert "document at token 3 " in refused(table.verify, tokens)


@pytest.mark.parametrize(
    "content", [None, b"", b"garbage" * 99], ids=["missing", "empty", "garbage"]
)
def test_a_tokenizer_that_cannot_be_read_is_refused_with_its_path(tmp_path, content):
    path = tmp_path / "tokenizer.model"
    if content is not None:
        path.write_bytes(content)
    assert refused(ByteTable, Config(tokenizer_path=str(path))).startswith(
        f"TOKENIZER_PATH={path}: "
    )


@pytest.mark.parametrize("size", [383, 385, 1024])
def test_a_vocabulary_of_another_size_is_refused_with_the_right_one(data, size):
    message = refused(
        ByteTable, Config(tokenizer_path=str(data / "tokenizer.model"), vocab_size=size)
    )
    assert message.startswith(f"VOCAB_SIZE={size}: ") and message.endswith("set VOCAB_SIZE=384")


def trained(path: Path, texts, **settings) -> Path:
    """A tokenizer of 384 pieces, trained on these texts."""
    model = io.BytesIO()
    options = TRAINER | {"vocab_size": 384, "character_coverage": 0.999} | settings
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, **options
    )
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="module")
def topics() -> list[str]:
    return [" ".join(text.split()) for _, text in sorted(prepare_data.topics.items())]


@pytest.fixture(scope="module")
def other(tmp_path_factory, topics) -> Path:
    """A tokenizer of as many pieces as the data's, trained on the same text read backwards."""
    path = tmp_path_factory.mktemp("other") / "other.model"
    return trained(path, [text[::-1] for text in topics])


def validation_of(folder: Path, tokens, model: Path, limit: int = 0) -> Validation:
    write_shard(folder / "fineweb_val_000000.bin", tokens)
    paths = dict(data_path=str(folder), tokenizer_path=str(model))
    cfg = Config(vocab_size=384, val_max_tokens=limit, **paths)
    return Validation(cfg, rank_of(1), Split(cfg, "val"))


WAYS_TO_SEPARATE = {
    "BOS": lambda t: t,
    "EOS": lambda t: np.append(np.where(t == BOS, 2, t)[1:], 2),
    "nothing": lambda t: t[t != BOS],
    "cut within a document": lambda t: t[100:6000],
}


@pytest.mark.parametrize("limit", [0, 20])
@pytest.mark.parametrize("way", WAYS_TO_SEPARATE)
def test_the_bytes_are_checked_whatever_separates_documents_and_however_few_are_scored(
    data, other, tmp_path, way, limit
):
    tokens = WAYS_TO_SEPARATE[way](read_shard(data / "fineweb_val_000000.bin").astype(int))
    val = validation_of(tmp_path, tokens, data / "tokenizer.model", limit)
    check = val.checked
    assert check.documents == check.of_documents > 0 and check.bytes == check.of_bytes > 8000
    assert limit or abs(check.bytes - val.target_bytes.sum()) < 9  # the first token is no target
    message = refused(validation_of, tmp_path, tokens, other, limit)
    assert "another tokenizer made the shards" in message


def test_a_long_validation_text_is_checked_in_documents_from_all_over_it(
    data, other, tmp_path, monkeypatch
):
    tokens = read_shard(data / "fineweb_val_000000.bin").astype(int)
    monkeypatch.setattr(train_gpt, "CHECKED_TOKENS", 8000)
    check = validation_of(tmp_path, tokens, data / "tokenizer.model").checked
    assert (check.documents, check.of_documents) == (2, 8) and 0 < check.bytes < check.of_bytes
    # a single text longer than that: its head
    text = tokens[tokens != BOS]
    check = validation_of(tmp_path, text, data / "tokenizer.model").checked
    assert 8000 < check.bytes < check.of_bytes
    assert "another tokenizer" in refused(validation_of, tmp_path, text, other)


def test_half_a_character_at_either_end_is_no_damage(data, tmp_path):
    sp = table_of(data / "tokenizer.model")[1]
    tokens = [*sp.encode("\u65e5")[-2:], *sp.encode("the end"), *sp.encode("\u65e5")[:2]]
    check = validation_of(tmp_path, tokens, data / "tokenizer.model").checked
    assert (check.documents, check.bytes, check.of_bytes) == (1, 7, 11)


def test_a_text_of_which_nothing_could_be_checked_is_said_aloud(data, tmp_path):
    sp = table_of(data / "tokenizer.model")[1]
    tokens = sp.encode("\u65e5")
    val = validation_of(tmp_path, tokens, data / "tokenizer.model")
    assert val.facts()["checked_bytes"] == "0 of 3"
    assert val.warnings(None) == ["0 bytes of validation were compared with decoded text"]


def test_an_unknown_piece_anywhere_in_validation_is_refused_with_its_place(data, tmp_path):
    tokens = np.tile(read_shard(data / "fineweb_val_000000.bin")[:50], 100)
    tokens[80 * 50 + 7] = 3
    message = refused(validation_of, tmp_path, tokens, data / "tokenizer.model")
    assert "1 of 5,000 tokens are unknown pieces, the first at token 4007 in document 81" in message


SPACES_ELSEWHERE = {
    "behind": dict(treat_whitespace_as_suffix=True),
    "within": dict(split_by_whitespace=False),
    "many": dict(remove_extra_whitespaces=False, allow_whitespace_only_pieces=True),
}


@pytest.mark.parametrize("where", SPACES_ELSEWHERE)
def test_a_piece_whose_space_the_rule_miscounts_is_refused_with_the_reason(tmp_path, topics, where):
    texts = [text.replace(". ", ".    ") for text in topics] + ["of the end"] * 9999
    model = trained(tmp_path / "m.model", texts, **SPACES_ELSEWHERE[where])
    tokens = [BOS, *table_of(model)[1].encode("the end.    At the end of the end.    Of")]
    message = refused(validation_of, tmp_path, tokens, model)
    assert "pieces such as" in message and "for whose space the challenge's rule counts" in message


def test_a_leading_space_that_the_rule_does_not_count_is_refused_with_the_reason(tmp_path, topics):
    model = trained(tmp_path / "m.model", topics, remove_extra_whitespaces=False)
    tokens = [BOS, *table_of(model)[1].encode(" a leading space"), BOS]
    assert "leading space counts nothing" in refused(validation_of, tmp_path, tokens, model)


def test_what_the_tokenizer_loses_of_the_text_is_said_aloud(data, tmp_path, topics):
    folding = dict(normalization_rule_name="nmt_nfkc_cf")
    model = trained(tmp_path / "m.model", topics, **folding)
    tokens = [BOS, *table_of(model)[1].encode(topics[0])]
    val = validation_of(tmp_path, tokens, model)
    assert val.altered[0] == ("A", "a")
    (warning,) = val.warnings({"lost": 3, "of": 8})
    assert warning.startswith("3 of 8 validation documents") and "makes 'A' 'a'" in warning
    assert "leaderboard" in warning
    assert val.warnings({"lost": 0, "of": 8}) == []
    plain = trained(tmp_path / "plain.model", topics)
    tokens = [BOS, *table_of(plain)[1].encode(topics[0])]
    assert validation_of(tmp_path, tokens, plain).warnings(None) == []


@pytest.mark.parametrize("rule, loses", [("nmt_nfkc_cf", True), ("nmt_nfkc", False)])
def test_without_a_manifest_a_tokenizer_that_loses_text_is_found_by_itself(
    tmp_path, topics, tiny, run, rule, loses
):
    model = trained(tmp_path / "m.model", topics, normalization_rule_name=rule)
    tokens = [BOS, *table_of(model)[1].encode(topics[0])]
    cfg = tiny(data_path=str(tmp_path), tokenizer_path=str(model))
    for split in ("val", "train"):
        write_shard(tmp_path / f"fineweb_{split}_000000.bin", tokens)
    lost = train_gpt.load_inputs(cfg, run).fingerprint.get("lost_documents")
    assert lost == ({"lost": None, "of": None} if loses else None)
    assert [text[:41] for text in run.warnings] == loses * [
        "an unknown number of validation documents"
    ]


def test_byte_counts_beside_the_shards_are_no_shards_and_must_agree(data, tmp_path):
    tokens = read_shard(data / "fineweb_val_000000.bin").astype(int)
    sizes = np.append(0, table_of(data / "tokenizer.model")[0].count(tokens))
    side_car = tmp_path / "fineweb_val_bytes_000000.bin"
    write_shard(side_car, sizes)
    for limit in (0, 100):
        val = validation_of(tmp_path, tokens, data / "tokenizer.model", limit)
        assert val.n == (limit or len(tokens) - 1)
        assert val.facts()["side_car"] == "states the same bytes"
    write_shard(side_car, np.roll(sizes, 1))
    message = refused(validation_of, tmp_path, tokens, data / "tokenizer.model")
    assert side_car.name in message and "of another text" in message


@pytest.mark.parametrize("name", ["fineweb_val_copy", "fineweb_val_0.old", "fineweb_val_"])
def test_a_file_that_is_neither_shard_nor_byte_counts_is_refused(tmp_path, name):
    shards_in(tmp_path, [BOS, 5])
    write_shard(tmp_path / f"{name}.bin", [BOS, 5])
    assert f"{name}.bin: no number" in refused(Split, Config(data_path=str(tmp_path)), "val")


# ── Validation ────────────────────────────────────────────────────────────────────────────────────
def test_validation_holds_every_target_with_its_bytes(tiny, data):
    cfg = tiny(val_max_tokens=0)
    tokens = np.array(read_shard(data / "fineweb_val_000000.bin"))
    val = Validation(cfg, rank_of(1), Split(cfg, "val"))
    assert (
        val.n == len(tokens) - 1 == len(val.target_bytes) and val.tokens.tolist() == tokens.tolist()
    )
    assert val.target_bytes.sum() == ByteTable(cfg).count(tokens).sum()


@pytest.mark.parametrize("limit", [1, 2, 1500, 10**9])
def test_val_max_tokens_keeps_the_first_targets_and_never_repeats_the_split(tiny, data, limit):
    cfg = tiny(val_max_tokens=limit)
    tokens, val = (
        np.array(read_shard(data / "fineweb_val_000000.bin")),
        Validation(cfg, rank_of(1), Split(cfg, "val")),
    )
    assert (
        val.n == min(limit, len(tokens) - 1) and val.tokens.tolist() == tokens[: limit + 1].tolist()
    )


@pytest.mark.parametrize("parts", [[], [[]], [[1]], [[], []], [[1, 1]], [[1, 2, 1]]], ids=str)
def test_a_validation_split_without_text_is_refused_with_its_folder(tiny, tmp_path, parts):
    cfg = tiny(data_path=str(shards_in(tmp_path, *parts)))
    message = refused(lambda: Validation(cfg, rank_of(1), Split(cfg, "val")))
    assert message.startswith(f"DATA_PATH={tmp_path}: ") and "prepare_data.py" in message


def test_the_smallest_validation_split_is_trained_with_and_scored(tiny, data, tmp_path):
    shutil.copy(data / "fineweb_train_000000.bin", tmp_path)
    sp = table_of(data / "tokenizer.model")[1]
    report = main(
        tiny(data_path=str(shards_in(tmp_path, [BOS, sp.piece_to_id("er")])), strict=False)
    )
    assert (report["val_tokens"], report["val_bytes"]) == (1, 2) and report["exit_code"] == 0
    assert report["tokens_per_byte"] == report["data"]["tokens_per_byte"] == 0.5
    assert report["data"]["checked_documents"] == "1 of 1"
    assert report["data"]["checked_bytes"] == "2 of 2"


# ── Manifest ──────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture
def dataset(data, tmp_path, tiny):
    """A folder of shards with the manifest of prepare_data.py, and the configuration to use it."""
    folder = tmp_path / "dataset"
    shutil.copytree(data, folder)
    sp = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    more = [BOS, *sp.encode("one more document")]
    write_shard(folder / "fineweb_train_000001.bin", more)
    write_shard(folder / "fineweb_val_000001.bin", more[::-1])
    entries = [
        prepare_data.shard_entry(path, path.name.split("_")[1], len(read_shard(path)))
        for path in sorted(folder.glob("*.bin"))
    ]
    splits = {
        split: {"documents": 1, "tokens": 1, "utf8_bytes": 1} for split in prepare_data.SPLITS
    }
    prepare_data.write_manifest(
        folder,
        folder / "tokenizer.model",
        entries,
        {
            "splits": splits,
            "disjoint": {
                "method": "by hash",
                "train_documents": 53,
                "val_documents": 9,
                "shared": 0,
            },
            "settings": {},
        },
    )
    return folder, tiny(data_path=str(folder), tokenizer_path=str(folder / "tokenizer.model"))


def checked(cfg: Config, *names: str) -> dict:
    return check_data(cfg, {name: Split(cfg, name) for name in names or ("val", "train")})


def change(folder: Path, edit) -> None:
    """Rewrites the manifest after edit(manifest)."""
    manifest = json.loads((folder / "manifest.json").read_text())
    edit(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_data_that_agree_with_their_manifest_are_accepted_with_a_fingerprint(dataset):
    folder, cfg = dataset
    found = checked(cfg)
    assert (
        found["tokenizer_sha256"]
        == hashlib.sha256((folder / "tokenizer.model").read_bytes()).hexdigest()
    )
    assert found["val_sha256"] == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.glob("*_val_*.bin")
    }
    assert (found["train_shards"], found["val_shards"]) == (2, 2)
    assert found["train_tokens"] == sum(
        len(read_shard(path)) for path in folder.glob("*_train_*.bin")
    )
    assert "agrees" in found["manifest"] and "no document in both" in found["manifest"]


def test_a_folder_without_a_manifest_is_accepted_and_says_what_was_not_checked(dataset):
    (dataset[0] / "manifest.json").unlink()
    assert "not checked" in checked(dataset[1])["manifest"]


def test_the_documents_that_the_manifest_calls_lost_are_in_the_result_and_aloud(dataset):
    assert "lost_documents" not in checked(dataset[1])
    lost = dict(documents=1234, altered_documents=30)
    change(dataset[0], lambda m: m["splits"].update(val=lost))
    assert checked(dataset[1])["lost_documents"] == {"lost": 30, "of": 1234}
    report = main(dataset[1])
    log = (Path(dataset[1].logs_dir) / dataset[1].run_id / "train.log").read_text()
    (warning,) = report["warnings"]
    assert "30 of 1,234" in warning and log.count(f"WARNING: {warning}") == 2
    assert "tokens_per_byte 0." in log
    assert report["data"]["lost_documents"] == {"lost": 30, "of": 1234}
    change(dataset[0], lambda m: m["splits"]["val"].update(altered_documents="30"))
    with pytest.raises(Refusal, match=r"no manifest .*not whole numbers"):
        checked(dataset[1])


def test_a_manifest_that_knows_nothing_about_overlap_says_so(dataset):
    change(dataset[0], lambda m: m.update(disjoint=None))
    assert "not stated" in checked(dataset[1])["manifest"]


DAMAGE = {  # what happened to the folder: (how, part of the refusal)
    "another size stated": (
        lambda f: change(f, lambda m: m["shards"][0].update(bytes=10)),
        "fineweb_train_000000.bin",
    ),
    "another val hash stated": (
        lambda f: change(f, lambda m: m["shards"][2].update(sha256="0" * 64)),
        "fineweb_val_000000.bin",
    ),
    "another validation text": (
        lambda f: write_shard(
            f / "fineweb_val_000001.bin", read_shard(f / "fineweb_val_000001.bin")[::-1]
        ),
        "fineweb_val_000001.bin",
    ),
    "a longer training shard": (
        lambda f: write_shard(f / "fineweb_train_000001.bin", [1] * 99),
        "fineweb_train_000001.bin",
    ),
    "another tokenizer": (
        lambda f: (f / "tokenizer.model").write_bytes(b"another"),
        "TOKENIZER_PATH=",
    ),
    "3 documents in both splits": (
        lambda f: change(f, lambda m: m["disjoint"].update(shared=3)),
        "3 documents",
    ),
    "a stray training shard": (
        lambda f: write_shard(f / "fineweb_train_000002.bin", [1, 2]),
        "fineweb_train_000002.bin",
    ),
    "a stray validation shard": (
        lambda f: write_shard(f / "fineweb_val_000002.bin", [1, 2]),
        "fineweb_val_000002.bin",
    ),
    "a validation shard is missing": (
        lambda f: (f / "fineweb_val_000001.bin").unlink(),
        "fineweb_val_000001.bin",
    ),
    "a training shard is missing": (
        lambda f: (f / "fineweb_train_000001.bin").unlink(),
        "fineweb_train_000001.bin",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_data_that_differ_from_their_manifest_are_refused(dataset, damage):
    (folder, cfg), (inflict, complaint) = dataset, DAMAGE[damage]
    inflict(folder)
    message = refused(checked, cfg)
    assert complaint in message and re.search(
        "prepare_data.py|manifest.json|use the one that lies beside", message
    )


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"3",
        b"{}",
        b"\xff\xfe\x00",
        b'{"shards": 3}',
        b'{"shards": [{"file": "x"}]}',
        b'{"shards": [], "tokenizer": "x", "disjoint": null}',
        b'{"shards": [], "tokenizer": {"sha256": "x"}, "disjoint": "no"}',
        b'{"shards": [], "tokenizer": {"sha256": null}, "disjoint": null}',
    ],
    ids=str,
)
def test_an_unreadable_manifest_is_refused_and_not_ignored(dataset, content):
    (dataset[0] / "manifest.json").write_bytes(content)
    assert re.search("manifest.json|TOKENIZER_PATH", refused(checked, dataset[1]))


def test_scoring_alone_needs_no_training_shards(dataset):
    folder, cfg = dataset
    for path in folder.glob("*_train_*.bin"):
        path.unlink()
    assert "agrees" in checked(cfg, "val")["manifest"]


# ── The command ───────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    "knobs, blamed",
    [
        (dict(data_path="/nowhere"), "DATA_PATH=/nowhere: "),
        (dict(tokenizer_path="/nowhere"), "TOKENIZER_PATH=/nowhere: "),
        (dict(tokenizer_path=""), "TOKENIZER_PATH=: "),
        (dict(vocab_size=512), "VOCAB_SIZE=512: "),
    ],
    ids=str,
)
def test_bad_data_end_the_process_with_exit_2_and_one_line_on_stderr(
    tiny, knobs, blamed, monkeypatch, capfd
):
    monkeypatch.setattr("signal.signal", lambda *_: None)
    for name, value in environment(tiny(**knobs)).items():
        monkeypatch.setenv(name, value)
    assert command_line([]) == 2
    err = capfd.readouterr().err
    assert len(err.splitlines()) == 1 and err.startswith(f"error: {blamed}") and "exit 2" in err


def test_a_folder_as_tokenizer_is_refused_and_does_not_abort_the_process(tiny, data):
    done = subprocess.run(
        [sys.executable, str(ROOT / "train_gpt.py")],
        env=environment(tiny(tokenizer_path=str(data))),
        text=True,
        capture_output=True,
        check=False,
        timeout=HANG,
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"error: TOKENIZER_PATH={data}: ")


# ── The challenge's own data, where there are any ─────────────────────────────────────────────────
REAL = Path(os.environ.get("GOLF_DATA", "/none"))
real = pytest.mark.skipif(
    "GOLF_DATA" not in os.environ, reason="GOLF_DATA names no folder with the challenge's data"
)


@pytest.fixture
def official() -> Config:
    return Config(
        data_path=str(REAL / "fineweb_val_head"),
        tokenizer_path=str(REAL / "tokenizers" / "fineweb_1024_bpe.model"),
    )


@real
def test_the_902_official_documents_have_2504867_bytes_each_counted_right(official):
    table, tokens = (
        ByteTable(official),
        Split(official, "val").take(0, Split(official, "val").tokens),
    )
    documents = np.split(tokens, np.flatnonzero(tokens == BOS)[1:])
    texts = [table.sp.decode(d.tolist()).encode() for d in documents]
    assert len(documents) == 902 and [table.count(d).sum() for d in documents] == [
        len(text) for text in texts
    ]
    assert Validation(official, rank_of(1), Split(official, "val")).target_bytes.sum() == 2_504_867


@real
def test_the_official_documents_have_as_many_bytes_in_8192_pieces(official):
    """The first 200 documents, encoded again: fewer tokens, the same bytes, ids within limits."""
    tokens = Split(official, "val").take(0, 300_000)
    documents = np.split(tokens, np.flatnonzero(tokens == BOS)[1:])[:200]
    small = ByteTable(official)
    path = REAL / "tokenizers" / "fineweb_8192_bpe.model"
    large = ByteTable(Config(tokenizer_path=str(path), vocab_size=8192))
    texts = [small.sp.decode(document.tolist()) for document in documents]
    encoded = [np.array([BOS, *large.sp.encode(text)]) for text in texts]
    assert [large.count(d).sum() for d in encoded] == [small.count(d).sum() for d in documents]
    assert 0.6 < sum(map(len, encoded)) / sum(map(len, documents)) < 0.7
    assert max(d.max() for d in encoded) < 8192


@real
def test_the_byte_table_of_the_official_pieces_is_that_of_the_seeds(official):
    golden = json.loads((Path(__file__).parent / "golden" / "seeds.json").read_text())
    table = ByteTable(official)
    assert golden["scoring"]["bytes"]["tables"] == {
        "sum_of_bytes": table.base.sum(),
        "ids_with_leading_space": table.space.sum(),
        "boundary_ids": table.boundary.sum(),
    }


@real
def test_the_official_shard_is_refused_with_the_larger_official_tokenizer(official):
    wrong = Config(tokenizer_path=str(REAL / "tokenizers" / "fineweb_8192_bpe.model"))
    assert refused(ByteTable, wrong).endswith("set VOCAB_SIZE=8192")
