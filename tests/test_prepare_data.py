"""Tests of prepare_data.py.

No network: the hub is a server on this machine. Real data comes from $GOLF_DATA.
"""

import bz2
import contextlib
import functools
import gzip
import hashlib
import http.server
import importlib.util
import itertools
import json
import lzma
import os
import random
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import rich.progress
import sentencepiece as spm
import zstandard
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import prepare_data
import train_gpt

# fmt: off
WORDS = [
    "the", "golf", "of", "a", "small", "model", "is", "to", "say", "in", "few",
    "bits", "what", "it", "has", "read", "and", "no", "more", "than", "that",
]
# fmt: on
needs_golf_data = pytest.mark.skipif(
    "GOLF_DATA" not in os.environ, reason="GOLF_DATA names no folder of real data"
)


def make_documents(count: int, seed: int = 0) -> list[str]:
    """Return distinct documents of some 60 words, with text beyond ASCII in each."""
    draw = np.random.default_rng(seed)
    return [
        f"Text {seed}.{index}: naïve “日本” " + " ".join(draw.choice(WORDS, 60))
        for index in range(count)
    ]


def write_jsonl(path: Path, documents: list[str]) -> Path:
    path.write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8"
    )
    return path


def run(*arguments) -> int:
    return prepare_data.main([str(argument) for argument in arguments])


def refusal(capsys, *arguments) -> str:
    """Run a command that must be refused; return its one line."""
    capsys.readouterr()
    assert run(*arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def manifest_of(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


def shard_tokens(folder: Path, split: str) -> np.ndarray:
    """Read a split's tokens and check every header on the way."""
    parts = [np.empty(0, dtype="<u2")]
    for entry in manifest_of(folder)["shards"]:
        if entry["split"] == split:
            raw = (folder / entry["file"]).read_bytes()
            header = np.frombuffer(raw[:1024], dtype="<i4")
            assert header[:3].tolist() == [20240520, 1, entry["tokens"]] and not header[3:].any()
            parts.append(np.frombuffer(raw[1024:], dtype="<u2"))
            assert len(parts[-1]) == entry["tokens"] and len(raw) == entry["bytes"]
            assert hashlib.sha256(raw).hexdigest() == entry["sha256"]
    return np.concatenate(parts)


def decoded(folder: Path, split: str) -> list[str]:
    """Turn a split back into its documents."""
    tokenizer = spm.SentencePieceProcessor(
        model_file=str(folder / manifest_of(folder)["tokenizer"]["file"])
    )
    tokens = shard_tokens(folder, split)
    starts = np.flatnonzero(tokens == 1)
    assert len(tokens) == 0 or starts[0] == 0
    return [tokenizer.decode(part[1:].tolist()) for part in np.split(tokens, starts)[1:]]


def tree_hash(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
    }


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """A tokenizer of 320 pieces."""
    path = tmp_path_factory.mktemp("model") / "small.model"
    path.write_bytes(prepare_data.train_tokenizer(make_documents(50), 320))
    return path


@pytest.fixture(scope="session")
def made(tmp_path_factory, model) -> tuple[Path, list]:
    """A finished dataset of 40 documents, and the arguments that made it."""
    folder = tmp_path_factory.mktemp("made")
    source = write_jsonl(folder / "in.jsonl", make_documents(40))
    arguments = ["text", source, "--tokenizer", model, "--val-fraction", "0.25", "--workers", "1"]
    assert run(*arguments, "--out", folder / "out") == 0
    return folder / "out", arguments


# ---- Real data


@needs_golf_data
def test_official_validation_shard_is_rebuilt_token_for_token(tmp_path):
    data = Path(os.environ["GOLF_DATA"])
    source = data / "fineweb_val_head" / "docs.jsonl"
    tokenizer = data / "tokenizers" / "fineweb_1024_bpe.model"
    assert (
        run(
            "text",
            source,
            "--out",
            tmp_path / "out",
            "--tokenizer",
            tokenizer,
            "--val-fraction",
            "1",
        )
        == 0
    )
    official = np.fromfile(
        data / "fineweb_val_head" / "fineweb_val_000000.bin", dtype="<u2", offset=1024
    )
    assert np.array_equal(shard_tokens(tmp_path / "out", "val"), official)
    texts = [json.loads(line)["text"] for line in source.read_text(encoding="utf-8").splitlines()]
    assert manifest_of(tmp_path / "out")["splits"] == {
        "train": dict.fromkeys(prepare_data.TOTALS, 0),
        # These texts are already as the tokenizer normalises them, so their own bytes are what
        # must be counted.
        "val": {
            "documents": len(texts),
            "tokens": len(official),
            "utf8_bytes": sum(len(t.encode()) for t in texts),
            "raw_bytes": sum(len(t.encode()) for t in texts),
            "altered_documents": 0,
        },
    }


@needs_golf_data
def test_trained_tokenizer_has_the_settings_of_the_official_one():
    official = spm.SentencePieceProcessor(
        model_file=str(Path(os.environ["GOLF_DATA"]) / "tokenizers" / "fineweb_1024_bpe.model")
    )
    texts = [text + " 2024" * 60 for text in make_documents(50)]
    trained = spm.SentencePieceProcessor(model_proto=prepare_data.train_tokenizer(texts, 320))
    for index in range(4 + 256):  # control and byte pieces
        assert trained.id_to_piece(index) == official.id_to_piece(index)
    for sample in ("  two\n\nspaces ", "ﬁ ① Ａ", "2024", " leading"):
        assert trained.decode(trained.encode(sample)) == official.decode(official.encode(sample))
    assert len(trained.encode("2024")) == len(official.encode("2024")) == 4  # digits stand alone


# ---- Reading


def compress(path: Path, suffix: str) -> Path:
    packed = path.with_name(path.name + suffix)
    pack = {
        ".gz": gzip.compress,
        ".bz2": bz2.compress,
        ".xz": lzma.compress,
        ".zst": zstandard.ZstdCompressor().compress,
    }[suffix]
    whole = path.read_bytes()
    # Two members one after the other, as parallel compressors write them.
    packed.write_bytes(pack(whole[:700]) + pack(whole[700:]))
    return packed


def test_every_kind_of_file_gives_the_same_documents(tmp_path):
    documents = make_documents(20)
    documents[3] = documents[3].replace(" ", "\n", 4)
    jsonl = write_jsonl(tmp_path / "in.jsonl", documents)
    txt = tmp_path / "in.v1.txt"
    txt.write_text("\n \n\n".join(documents), encoding="utf-8")
    files = [jsonl, txt] + [
        compress(path, suffix) for path in (jsonl, txt) for suffix in prepare_data.PACKINGS
    ]
    for path in files:
        assert list(prepare_data.TextDocuments([path], "text")()) == documents, path
    assert list(prepare_data.TextDocuments([txt, jsonl], "text")()) == documents + documents


def test_lines_longer_than_a_chunk_and_half_surrogates_are_read(tmp_path):
    (tmp_path / "in.jsonl").write_text(
        json.dumps({"body": "long " * 600_000}) + '\n{"body": "a\\ud800b"}\n\n'
    )
    assert list(prepare_data.TextDocuments([tmp_path / "in.jsonl"], "body")()) == [
        "long " * 600_000,
        "a?b",
    ]


LINES = [f'{{"text": "document {index} {"word " * 99}"}}\n'.encode() for index in range(3)]
PACK = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}
SKIPPED_FRAME = b"\x50\x2a\x4d\x18\x04\0\0\0abcd"
STREAMS = {  # name: (packed, what is read: the number of documents or a part of the refusal)
    **{f"three{suffix}": (b"".join(map(pack, LINES)), 3) for suffix, pack in PACK.items()},
    "padded.gz": (gzip.compress(LINES[0]) + bytes(5) + gzip.compress(LINES[1]) + bytes(512), 2),
    "padded.xz": (lzma.compress(LINES[0]) + bytes(4) + lzma.compress(LINES[1]) + bytes(8), 2),
    "padded wrongly.xz": (lzma.compress(LINES[0]) + bytes(3) + lzma.compress(LINES[1]), "3 zeros"),
    "padded wrongly at the end.xz": (lzma.compress(LINES[0]) + bytes(5), "5 zeros"),
    "padded.bz2": (bz2.compress(LINES[0]) + bytes(4), "4 zeros behind stream 1"),
    "skipped.zst": (SKIPPED_FRAME + PACK[".zst"](LINES[0]) + SKIPPED_FRAME, 1),
    "empty streams.xz": (lzma.compress(b"") * 3 + lzma.compress(LINES[0]), 1),
    **{
        f"garbage{suffix}": (pack(LINES[0]) + b"garbage", "stream 2")
        for suffix, pack in PACK.items()
    },
    **{
        f"second damaged{suffix}": (pack(LINES[0]) + b"\xff" + pack(LINES[1])[1:], "stream 2")
        for suffix, pack in PACK.items()
    },
    **{
        f"second cut{suffix}": (pack(LINES[0]) + pack(LINES[1])[:-3], "stream 2")
        for suffix, pack in PACK.items()
    },
    **{f"nothing{suffix}": (b"", "it is empty") for suffix in PACK},
}


@pytest.mark.parametrize("chunk", [1, 7, 1 << 14])
@pytest.mark.parametrize("name", STREAMS)
def test_every_stream_of_a_compressed_file_is_read_or_the_file_is_refused(
    tmp_path, name, chunk, monkeypatch
):
    monkeypatch.setattr(prepare_data, "CHUNK", chunk)
    packed, right = STREAMS[name]
    path = tmp_path / f"in.jsonl{Path(name).suffix}"
    path.write_bytes(packed)
    if isinstance(right, int):
        assert len(list(prepare_data.TextDocuments([path], "text")())) == right
    else:
        with pytest.raises(prepare_data.UserError, match=f"cannot be read to its end.*{right}"):
            list(prepare_data.TextDocuments([path], "text")())


OTHER_KINDS = {  # name: (content, what the refusal names)
    "gz.jsonl": (gzip.compress(LINES[0]), "holds .gz data: rename it .* ends in .gz"),
    "zst.jsonl.gz": (PACK[".zst"](LINES[0]), "holds .zst data: rename it .* ends in .zst"),
    "xz.txt.zst": (lzma.compress(LINES[0]), "holds .xz data"),
    "bz2.txt.xz": (bz2.compress(LINES[0]), "holds .bz2 data"),
    "parquet.jsonl": (b"PAR1\x15\x04\x15\x20", "holds .parquet data"),
    "gz.parquet": (gzip.compress(LINES[0]), "holds .gz data"),
    "tar.txt.gz": (gzip.compress(b"name.txt" + bytes(249) + b"ustar\0"), "is no text .*zero bytes"),
    "pdf.txt": (b"%PDF-1.7\n%\xe2\xe3", "holds .pdf data"),
    "zip.txt": (b"PK\x03\x04" + bytes(30), "holds .zip data"),
    "twice.jsonl.gz": (gzip.compress(gzip.compress(LINES[0])), "holds .gz data within: unpack it"),
    "u16.jsonl": (LINES[0].decode().encode("utf-16"), "is UTF-16: .*iconv -f UTF-16"),
    "u16be.txt": ("a word".encode("utf-16-be"), "is UTF-16BE: .*-f UTF-16BE"),
    "u16.jsonl.gz": (gzip.compress(LINES[0].decode().encode("utf-16-le")), "is UTF-16LE"),
    "zero.txt": (b"a\0b", "is no text .*zero bytes"),
    "u32le.txt": ("a word".encode("utf-32-le"), "is UTF-32LE: .*-f UTF-32LE"),
    "u32.txt": ("a word".encode("utf-32"), "is UTF-32: .*iconv -f UTF-32"),
}


@pytest.mark.parametrize("name", OTHER_KINDS)
def test_a_file_of_another_kind_than_its_name_says_is_refused_with_its_kind(
    tmp_path, model, capsys, name
):
    content, said = OTHER_KINDS[name]
    (tmp_path / name).write_bytes(content)
    options = ["--tokenizer", model, "--val-docs", "1", "--workers", "1"]
    line = refusal(capsys, "text", tmp_path / name, "--out", tmp_path / "out", *options)
    assert re.search(said, line) and name in line, line
    assert not (tmp_path / "out").exists()


def test_text_that_looks_like_another_kind_and_a_mark_before_utf8_are_read(tmp_path):
    for text in ("BZh and PK and PAR1", "PAR1 is a prefix", "7z"):
        (tmp_path / "in.txt").write_text(text)
        prepare_data.check_input(tmp_path / "in.txt", "text")
        assert list(prepare_data.TextDocuments([tmp_path / "in.txt"], "text")()) == [text]
    marked = tmp_path / "in.jsonl"
    marked.write_text('{"text": "marked"}', encoding="utf-8-sig")
    assert list(prepare_data.TextDocuments([marked], "text")()) == ["marked"]


def parquet_of(path: Path, **columns) -> Path:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table(columns), path)
    return path


def test_parquet_gives_the_same_documents(tmp_path, capsys):
    documents = make_documents(20)
    path = parquet_of(tmp_path / "in.parquet", id=list(range(21)), text=[*documents, None])
    assert list(prepare_data.TextDocuments([path], "text")()) == documents
    assert "left out 1 of 21 rows, which have null in 'text'" in capsys.readouterr().out
    with pytest.raises(prepare_data.UserError, match=r"no column 'body'.*\['text'\] with --field"):
        list(prepare_data.TextDocuments([path], "body")())


def test_parquet_columns_of_bytes_and_of_repeated_text_are_text(tmp_path):
    documents = make_documents(3)
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    for column in (
        [text.encode() for text in documents],
        pyarrow.array(documents, pyarrow.large_string()),
        pyarrow.array(documents).dictionary_encode(),
    ):
        path = parquet_of(tmp_path / "in.parquet", text=column)
        assert list(prepare_data.TextDocuments([path], "text")()) == documents


@pytest.mark.parametrize(
    ("column", "said"),
    [
        ([1, 2], "has int64 in its column 'text', not text"),
        ([["a"], ["b"]], "has list<element: string> in its column 'text'"),
        ([{"text": "a"}, {"text": "b"}], "has struct<text: string> in its column 'text'"),
        ([None, None], "has null in its column 'text'"),
        ([b"good", b"na\xefve"], "has a value in its column 'text' that is not UTF-8"),
    ],
    ids=str,
)
def test_parquet_columns_that_are_no_text_are_refused_in_one_line(
    tmp_path, model, capsys, column, said
):
    path = parquet_of(tmp_path / "in.parquet", text=column, title=["a", "b"])
    options = ["--tokenizer", model, "--val-docs", "1", "--workers", "1"]
    line = refusal(capsys, "text", path, "--out", tmp_path / "out", *options)
    assert said in line and ("UTF-8" in said or "name one of ['title'] with --field" in line), line


def test_parquet_without_pyarrow_names_the_install_command(tmp_path, capsys, monkeypatch):
    (tmp_path / "in.parquet").write_bytes(b"PAR1")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    line = refusal(capsys, "text", tmp_path / "in.parquet", "--out", tmp_path / "out")
    assert "in.parquet" in line and "pip install pyarrow" in line


# ---- Splitting


def test_duplicates_are_dropped_and_splits_share_nothing(tmp_path, model):
    documents = make_documents(60)
    variants = [
        documents[0].replace(" ", "\n  "),
        documents[1].replace("T", "Ｔ"),
        documents[2] + "\u200b ",
    ]
    source = write_jsonl(tmp_path / "in.jsonl", documents[:30] + variants + documents)
    arguments = ("--tokenizer", model, "--val-fraction", "0.3", "--workers", "1")
    assert run("text", source, "--out", tmp_path / "out", *arguments) == 0
    train, val = decoded(tmp_path / "out", "train"), decoded(tmp_path / "out", "val")
    assert not set(train) & set(val) and min(len(train), len(val)) > 5
    assert sorted(train + val) == sorted(documents)
    assert [
        text for text in documents if text in set(train)
    ] == train  # the order of the input is kept
    manifest = manifest_of(tmp_path / "out")
    assert manifest["disjoint"]["shared"] == 0
    assert (
        manifest["disjoint"]["train_documents"]
        == manifest["splits"]["train"]["documents"]
        == len(train)
    )
    assert (
        manifest["disjoint"]["val_documents"] == manifest["splits"]["val"]["documents"] == len(val)
    )


@given(st.floats(0, 1), st.lists(st.binary(min_size=16, max_size=16)), st.randoms())
def test_a_documents_side_depends_on_nothing_but_its_text(fraction, keys, random):
    def sides(ordered):
        splitter = prepare_data.Splitter(prepare_data.Recipe(val_fraction=fraction))
        return {key: side for key in ordered if (side := splitter.split_of(key))}

    shuffled = random.sample(keys, len(keys))
    assert sides(keys) == sides(shuffled) and set(sides(keys)) == set(keys)


def test_the_whole_key_space_goes_to_val_at_fraction_one():
    splitter = prepare_data.Splitter(prepare_data.Recipe(val_fraction=1.0))
    assert {splitter.split_of(bytes([byte]) * 16) for byte in range(256)} == {"val"}


def test_tokenizer_sees_no_validation_text():
    documents = make_documents(40)
    for recipe in (prepare_data.Recipe(val_fraction=0.3), prepare_data.Recipe(val_docs=12)):
        splitter = prepare_data.Splitter(recipe)
        train = [
            text
            for text in documents
            if splitter.split_of(prepare_data.document_key(text)) == "train"
        ]
        assert list(prepare_data.tokenizer_sample(documents + documents, recipe)) == train
        assert 20 < len(train) < 35


def test_val_docs_shard_size_name_and_limits(tmp_path, model):
    documents = make_documents(12)
    source = write_jsonl(tmp_path / "in.jsonl", documents)
    arguments = ("text", source, "--tokenizer", model, "--workers", "1", "--val-docs", "2")
    assert (
        run(
            *arguments,
            "--out",
            tmp_path / "a",
            "--shard-tokens",
            "500",
            "--name",
            "mine",
            "--max-docs",
            "10",
        )
        == 0
    )
    assert decoded(tmp_path / "a", "val") == documents[:2]
    assert decoded(tmp_path / "a", "train") == documents[2:10]
    train = [entry for entry in manifest_of(tmp_path / "a")["shards"] if entry["split"] == "train"]
    assert len(train) > 1 and {entry["tokens"] for entry in train[:-1]} == {500}
    assert [entry["file"] for entry in train] == [
        f"mine_train_{index:06d}.bin" for index in range(len(train))
    ]
    assert run(*arguments, "--out", tmp_path / "b", "--max-tokens", "700") == 0
    kept = len(decoded(tmp_path / "b", "train"))
    sizes = [len(document.tokens) for document in prepare_data.encode_batch(model, documents)]
    assert sum(sizes[: 2 + kept]) >= 700 > sum(sizes[: 1 + kept])


@given(st.lists(st.integers(1, 40)), st.integers(1, 30))
def test_shards_hold_the_stream_whatever_the_cuts(tmp_path_factory, sizes, shard):
    folder = tmp_path_factory.mktemp("cut")
    writer = prepare_data.ShardWriter(folder, "train", prepare_data.Recipe(shard_tokens=shard))
    stream = np.arange(sum(sizes), dtype="<u2")
    for part in np.split(stream, np.cumsum(sizes))[: len(sizes)]:
        writer.add(prepare_data.Encoded(b"", part, 1, 1, False))
    writer.close()
    (folder / "manifest.json").write_text(json.dumps({"shards": writer.shards}))
    assert np.array_equal(shard_tokens(folder, "train"), stream)
    assert all(entry["tokens"] == shard for entry in writer.shards[:-1])


# ---- Encoding


def test_utf8_bytes_are_those_of_the_byte_table(model):
    texts = [
        *make_documents(5),
        "two\n\nlines  ① ﬁ",
        "▁▁ ▅ \u200b emoji 🏌️ ẞ",
        " lead",
        "<s> </s> <unk>",
    ]
    tokenizer = spm.SentencePieceProcessor(model_file=str(model))
    for text, document in zip(texts, prepare_data.encode_batch(model, texts), strict=True):
        tokens = document.tokens
        # What the challenge counts: a piece's own bytes, plus one for its leading space unless a
        # document opens.
        table = 0
        for before, token in zip(tokens[:-1].tolist(), tokens[1:].tolist(), strict=True):
            piece = tokenizer.id_to_piece(token)
            own = 1 if tokenizer.is_byte(token) else len(piece.removeprefix("▁").encode())
            table += own + (piece.startswith("▁") and not tokenizer.is_control(before))
        decoded = tokenizer.decode(tokens[1:].tolist())
        assert document.utf8_bytes == table == len(decoded.encode()), text
        assert document.raw_bytes == len(text.encode()) and not document.altered


def test_workers_do_not_change_the_result(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", make_documents(1500))
    for workers in (1, 2):
        arguments = ("--vocab-size", "320", "--shard-tokens", "40000", "--workers", workers)
        assert run("text", source, "--out", tmp_path / str(workers), *arguments) == 0
    assert tree_hash(tmp_path / "1") == tree_hash(tmp_path / "2")
    assert manifest_of(tmp_path / "1")["tokenizer"]["vocab_size"] == 320


# ---- Do the tokens give their text back?


def trained(path: Path, **settings) -> Path:
    """A tokenizer of 320 pieces, or the fewest that there can be, with these settings."""
    texts = [text.replace(" the ", "    the ") for text in make_documents(50)]
    options = dict(model_type="bpe", vocab_size=400, hard_vocab_limit=False, byte_fallback=True)
    options |= dict(character_coverage=0.999, normalization_rule_name="nmt_nfkc", pad_id=0)
    options |= dict(bos_id=1, eos_id=2, unk_id=3, minloglevel=2, num_threads=1)
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(path), **(options | settings)
    )
    return path.with_suffix(".model")


def never(*arguments):
    raise AssertionError("encoded")


MISFITS = {  # name: (settings of its training, what the refusal says)
    "no byte fallback": (dict(byte_fallback=False, vocab_size=60), "no byte fallback, .* lost"),
    "characters": (dict(byte_fallback=False, model_type="char"), "no byte fallback, .* lost"),
    "words": (dict(model_type="word", byte_fallback=False), "no byte fallback, .* lost"),
    "words with bytes": (dict(model_type="word"), "its tokens of ' leads' give back '▁leads'"),
    "space as suffix": (dict(treat_whitespace_as_suffix=True), "'.▁' has a space behind its first"),
    "pieces of words": (dict(split_by_whitespace=False), "has a space behind its first"),
    "pieces of spaces": (
        dict(remove_extra_whitespaces=False, allow_whitespace_only_pieces=True),
        "has a space behind its first",
    ),
    "kept spaces": (
        dict(remove_extra_whitespaces=False, add_dummy_prefix=False),
        "' leads' has 6 bytes; by the challenge's rule its tokens have 5",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_tokenizer_whose_tokens_do_not_give_text_back_is_refused_before_encoding(
    tmp_path, capsys, name, monkeypatch
):
    settings, reason = MISFITS[name]
    tokenizer = trained(tmp_path / "m", **settings)
    monkeypatch.setattr(prepare_data, "encode", never)
    source = write_jsonl(tmp_path / "in.jsonl", make_documents(5))
    options = ["--tokenizer", tokenizer, "--val-docs", "2", "--workers", "1"]
    line = refusal(capsys, "text", source, "--out", tmp_path / "out", *options)
    assert re.search(f"m.model is unfit: .*{reason}", line), line
    assert not (tmp_path / "out").exists()


def test_a_refusal_for_unknown_pieces_says_what_they_lose_of_validation(tmp_path, capsys):
    tokenizer = trained(tmp_path / "m", byte_fallback=False, vocab_size=60)
    documents = ["the golf of  a small model", "is \u6771\u4eac what it has", "left out"]
    source = write_jsonl(tmp_path / "in.jsonl", documents)
    options = ["--tokenizer", tokenizer, "--val-docs", "2", "--workers", "1"]
    line = refusal(capsys, "text", source, "--out", tmp_path / "out", *options)
    loss = r"unknown pieces in 1 of 2 validation documents, first in number 2: of 47 bytes, 46 norm"
    # The unknown piece takes the space before it along
    assert re.search(loss + r"alised, 39 would count", line), line


@pytest.mark.parametrize(
    "settings",
    [
        {},
        dict(add_dummy_prefix=False),
        dict(model_type="char"),
        dict(model_type="unigram"),
        dict(remove_extra_whitespaces=False),
        dict(normalization_rule_name="identity"),
    ],
    ids=str,
)
def test_a_tokenizer_whose_tokens_give_text_back_is_accepted(tmp_path, settings, capsys):
    tokenizer = trained(tmp_path / "m", **settings)
    documents = [*make_documents(5), " leads, and  folds\nno \u2460", "\u6771\u4eac 🏌️ ẞ", "a▁b ▁"]
    source = write_jsonl(tmp_path / "in.jsonl", documents)
    options = ["--tokenizer", tokenizer, "--val-docs", "4", "--workers", "1"]
    assert run("text", source, "--out", tmp_path / "out", *options) == 0
    assert "WARNING" not in capsys.readouterr().out
    for split, texts in (("val", documents[:4]), ("train", documents[4:])):
        found = manifest_of(tmp_path / "out")["splits"][split]
        assert found["altered_documents"] == 0
        assert found["raw_bytes"] == sum(len(text.encode()) for text in texts)
        assert found["utf8_bytes"] == sum(
            map(len, map(str.encode, decoded(tmp_path / "out", split)))
        )


def test_documents_that_a_tokenizer_folds_are_counted_and_said_aloud(tmp_path, capsys):
    tokenizer = trained(tmp_path / "m", normalization_rule_name="nmt_nfkc_cf")
    documents = ["The golf", "all small", "OF A", "in few bits", "Say"]
    source = write_jsonl(tmp_path / "in.jsonl", documents)
    options = ["--tokenizer", tokenizer, "--val-docs", "2", "--workers", "1"]
    for again in ("", "nothing to do"):
        assert run("text", source, "--out", tmp_path / "out", *options) == 0
        out = capsys.readouterr().out
        assert again in out
        assert "WARNING: 2 of 3 documents in train do not come back from their tokens" in out
        assert "WARNING: 1 of 2 documents in val do not come back from their tokens" in out
    splits = manifest_of(tmp_path / "out")["splits"]
    assert [splits[name]["altered_documents"] for name in ("train", "val")] == [2, 1]


def test_a_document_that_the_probes_did_not_foresee_is_refused_with_its_number(
    tmp_path, model, capsys, monkeypatch
):
    monkeypatch.setattr(prepare_data, "misfit", lambda table: "")
    tokenizer = trained(tmp_path / "m", byte_fallback=False, vocab_size=60)
    source = write_jsonl(tmp_path / "in.jsonl", ["the golf", "of a", "a \u6771"])
    options = ["--tokenizer", tokenizer, "--val-docs", "1", "--workers", "1"]
    line = refusal(capsys, "text", source, "--out", tmp_path / "out", *options)
    assert "document 3 has" in line and not (tmp_path / "out").exists()


# ---- Progress


class Clock:
    """A clock that goes on when it is told to, in place of the module `time`."""

    seconds = 1_000.0

    def monotonic(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    monkeypatch.setattr(prepare_data, "time", Clock())
    return prepare_data.time


@pytest.fixture
def repetitions(monkeypatch) -> list:
    """What progress asks to be repeated, as (function, seconds), to be called by the test."""
    asked = []

    def repeated(show, seconds):
        asked.append((show, seconds))
        return contextlib.nullcontext()

    monkeypatch.setattr(prepare_data, "repeated", repeated)
    return asked


def test_no_silence_of_ten_seconds_without_a_terminal():
    assert prepare_data.PROGRESS_SECONDS < 10


def test_progress_without_a_terminal_is_a_line_from_time_to_time_even_when_nothing_is_done(
    clock, repetitions, capsys
):
    with prepare_data.progress("encoding", "documents", 3_000) as state:
        ((show, seconds),) = repetitions
        assert seconds == prepare_data.PROGRESS_SECONDS
        clock.seconds += 20
        state.done = 2_000
        show()
        show()
        line = "encoding: 2,000 of 3,000 documents, 20 s so far, about 10 s left\n"
        assert capsys.readouterr().out == 2 * line
    assert capsys.readouterr().out == "encoding: 2,000 of 3,000 documents in 20 s\n"


def test_what_is_said_beside_another_thread_is_written_in_one_piece(monkeypatch):
    pieces = []
    written = SimpleNamespace(write=pieces.append, flush=lambda: None)
    monkeypatch.setattr(sys, "stdout", written)
    prepare_data.say("wrote a shard")
    assert [piece for piece in pieces if piece] == ["wrote a shard\n"]


def test_progress_of_one_piece_of_work_counts_nothing(clock, repetitions, capsys):
    with prepare_data.progress("training a tokenizer"):
        clock.seconds += 30 * 60
        repetitions[0][0]()
    assert capsys.readouterr().out.splitlines() == [
        "training a tokenizer: 30 min so far",
        "training a tokenizer: done in 30 min",
    ]


def test_progress_on_a_terminal_is_a_live_line_below_what_is_printed(
    clock, repetitions, monkeypatch, capsys
):
    bars = []
    bar = rich.progress.Progress

    def drawn_by_the_test(*columns, console):
        bars.append(bar(*columns, console=console, auto_refresh=False))
        return bars[0]

    monkeypatch.setattr(rich.progress, "Progress", drawn_by_the_test)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with prepare_data.progress("encoding", "documents", 3) as state:
        ((show, seconds),) = repetitions
        assert seconds == prepare_data.REFRESH_SECONDS
        clock.seconds += 20
        state.advance()
        state.advance()
        show()
        bars[0].refresh()
        print("wrote a shard")  # the live line is drawn anew below it
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().out).splitlines()
    shown = [line.strip() for line in text if line.strip()]
    below = shown[shown.index("wrote a shard") + 1]
    assert below.endswith("━ encoding: 2 of 3 documents, 20 s so far, about 10 s left")
    assert shown[-1].endswith("━ encoding: 2 of 3 documents in 20 s")


def test_a_repeated_call_goes_on_beside_a_block_until_that_ends_however_it_does():
    called = threading.Semaphore(0)
    callers = set()

    def show():
        callers.add(threading.current_thread())
        called.release()

    with pytest.raises(KeyError), prepare_data.repeated(show, 1e-3):
        for _ in range(3):
            assert called.acquire(timeout=60)
        raise KeyError
    (caller,) = callers
    assert caller is not threading.current_thread() and not caller.is_alive()


def test_a_block_does_not_wait_for_the_next_call():
    before = set(threading.enumerate())
    with prepare_data.repeated(print, 3_600):
        (thread,) = set(threading.enumerate()) - before
    assert not thread.is_alive()


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_the_share_of_the_files_goes_by_the_bytes_that_were_read(tmp_path, suffix):
    path = write_jsonl(tmp_path / "in.jsonl", make_documents(2000))
    if suffix == ".jsonl.gz":
        path = compress(path, ".gz")
    source = prepare_data.TextDocuments([path], "text")
    assert source.share(0) is None  # nothing was read
    for _ in range(2):  # each pass anew
        list(itertools.islice(source(), 1000))
        assert 0.4 < source.share(1000) < 0.6
        assert source.share(500) == source.share(1000) / 2
    assert len(list(source())) == 2000 and source.share(2000) == 1


def test_the_share_that_is_encoded_goes_by_the_limit_that_comes_first(tmp_path):
    source = prepare_data.DemoDocuments(["one", "two", "three", "four"])
    state = prepare_data.Progress("encoding", "documents", None)
    state.done = 1
    for limits, share in (({}, 1 / 4), ({"max_docs": 2}, 1 / 2), ({"max_tokens": 10}, 3 / 5)):
        recipe = prepare_data.Recipe(**limits)
        writer = prepare_data.ShardWriter(tmp_path, "train", recipe)
        writer.totals["tokens"] = 6
        writers = {"train": writer}
        state.share = functools.partial(prepare_data.share_encoded, state, recipe, writers, source)
        assert state.fraction() == share


def test_writing_the_splits_shows_which_share_of_the_documents_is_encoded(monkeypatch):
    state = prepare_data.Progress("encoding", "documents", None)
    monkeypatch.setattr(prepare_data, "progress", lambda *what: contextlib.nullcontext(state))
    source = prepare_data.DemoDocuments(["one"] * 4)
    splitter = prepare_data.Splitter(prepare_data.Recipe())
    splitter.keys["train"].add(b"key")  # each is a repetition, so that nothing is written
    shares = []

    def encoded():
        for _ in source():
            shares.append(state.fraction())
            yield prepare_data.Encoded(b"key", np.zeros(1, np.uint16), 3, 3, False)

    prepare_data.write_splits(encoded(), splitter, {}, None, source)
    assert [*shares, state.fraction()] == [0, 1 / 4, 1 / 2, 3 / 4, 1]


def test_a_long_step_of_each_command_says_that_it_goes_on(tmp_path, capsys, monkeypatch):
    """Every part of a run stands between two lines: what is read, trained, tried, encoded."""
    source = write_jsonl(tmp_path / "in.jsonl", make_documents(50))
    options = ["text", source, "--vocab-size", "320", "--val-docs", "2", "--workers", "1"]
    for _ in range(2):
        assert run(*options, "--out", tmp_path / "out") == 0
    said = re.sub(r" in \d+ s$", "", capsys.readouterr().out, flags=re.MULTILINE).splitlines()
    for line in (
        "reading for the tokenizer: 48 documents",
        "training a tokenizer of 320 pieces: done",
        "trying the tokenizer: done",
        "encoding: 50 documents",
        "comparing with their hashes: 3 of 3 files",
    ):
        assert line in said


# ---- Folders


def test_a_finished_folder_is_left_alone(made, capsys):
    folder, arguments = made
    before = tree_hash(folder), folder.stat().st_mtime_ns
    assert run(*arguments, "--out", folder) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert before == (tree_hash(folder), folder.stat().st_mtime_ns)


@pytest.mark.parametrize(
    ("option", "value", "old", "new"),
    [
        ("--val-fraction", "0.5", "val_fraction = 0.25", "not 0.5"),
        ("--shard-tokens", "77", "shard_tokens = 100000000", "not 77"),
        ("--max-docs", "7", "max_docs = null", "not 7"),
    ],
)
def test_other_settings_are_refused(made, capsys, option, value, old, new):
    folder, arguments = made
    before = tree_hash(folder)
    line = refusal(capsys, *arguments, option, value, "--out", folder)
    assert all(part in line for part in (str(folder), old, new, "choose another --out or delete"))
    assert tree_hash(folder) == before


def test_other_input_and_other_command_are_refused(made, capsys, tmp_path):
    folder, arguments = made
    other = write_jsonl(tmp_path / "in.jsonl", make_documents(41))
    assert "inputs" in refusal(capsys, "text", other, *arguments[2:], "--out", folder)
    assert 'command = "text", not "demo"' in refusal(capsys, "demo", "--out", folder)


def test_changed_and_foreign_folders_are_refused(tmp_path, model, capsys):
    source = write_jsonl(tmp_path / "in.jsonl", make_documents(5))
    arguments = (
        "text",
        source,
        "--tokenizer",
        model,
        "--val-fraction",
        "1",
        "--workers",
        "1",
        "--out",
        tmp_path / "out",
    )
    (tmp_path / "out").mkdir()  # an empty folder is as good as none
    assert run(*arguments) == 0
    shard = tmp_path / "out" / "fineweb_val_000000.bin"
    shard.write_bytes(shard.read_bytes()[:-2] + b"\0\0")
    assert "fineweb_val_000000.bin is missing or no longer" in refusal(capsys, *arguments)
    (tmp_path / "out" / "manifest.json").unlink()
    assert "choose another --out" in refusal(capsys, *arguments)
    assert shard.exists()


def test_two_runs_into_one_folder_are_refused(tmp_path, made, capsys):
    with FileLock(tmp_path / ".out.lock"):
        assert "another run" in refusal(capsys, *made[1], "--out", tmp_path / "out")


DIES_AT_SHARD_3 = f"""
import os, runpy, signal, sys

def heed(event, arguments):
    if event == "open" and "fineweb_train_000003" in str(arguments[0]):
        os.killpg(0, signal.SIGKILL)

sys.addaudithook(heed)
runpy.run_path({str(ROOT / "prepare_data.py")!r}, run_name="__main__")
"""


def test_an_interrupted_run_keeps_nothing_and_says_so(tmp_path, made, capsys, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_data, "encode", interrupted)
    assert run(*made[1], "--out", tmp_path / "out") == 130
    assert "the next run starts anew" in capsys.readouterr().out
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.partial").exists()


def test_a_killed_run_leaves_nothing_and_the_next_one_is_clean(tmp_path, model, capsys):
    source = write_jsonl(tmp_path / "in.jsonl", make_documents(1000))
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    options = ["text", source, "--tokenizer", model, "--workers", "1", "--shard-tokens", "2000"]
    command = [str(part) for part in (*options, "--out", out)]
    killed = subprocess.run(
        [sys.executable, "-c", DIES_AT_SHARD_3, *command],
        stdout=subprocess.DEVNULL,
        start_new_session=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists() and partial.exists()
    capsys.readouterr()
    assert run(*command) == 0
    assert "left of a run that was killed: deleted, this one starts anew" in capsys.readouterr().out
    assert not partial.exists()
    assert run(*command[:-1], tmp_path / "fresh") == 0
    assert tree_hash(out) == tree_hash(tmp_path / "fresh")


# ---- Errors


# One line that no compressor makes small: what is cut off is the only thing wrong with it
DENSE_TEXT = random.Random(0).randbytes(4000).hex().encode()
BAD_INPUTS = {
    "in.csv": (b"text", "no known kind"),
    "in.parquet.gz": (b"", "no known kind"),
    "in.jsonl": (
        b'{"text": "good"}\n{"text": 5}\n',
        r":2 has a number in the field 'text', not text: .*--field",
    ),
    "null.jsonl": (b'{"text": "good"}\n\n{"text": null}\n', ":3 has null in the field 'text'"),
    "fields.jsonl": (b'{"body": 1, "url": 2}\n', r":1 has no field 'text' \(but 'body', 'url'\)"),
    "list.jsonl": (b'["text"]\n', ":1 is a list and no JSON object"),
    "array.jsonl": (b'[\n{"text": "good"}\n]\n', ":1 is no JSON .*one whole object a line"),
    "deep.jsonl": (b'{"text": ' + b"[" * 100_000, ":1 is JSON nested too deeply"),
    "huge.jsonl": (b'{"n": ' + b"1" * 9999 + b"}", ":1 is no JSON .*4300"),
    "cut.jsonl": (b'{"text": "good"}\n{"text', ":2 is no JSON "),
    "latin.txt": ("naïve".encode("latin-1"), "not UTF-8.*iconv"),
    "latin.jsonl": ('{"text": "naïve"}'.encode("latin-1"), ":1 is not UTF-8.*iconv"),
    "cut.txt.gz": (gzip.compress(DENSE_TEXT)[:-400], "cannot be read to its end.*whole copy"),
    "cut.txt.xz": (lzma.compress(DENSE_TEXT)[:-400], "cannot be read to its end.*whole copy"),
    "cut.txt.zst": (
        zstandard.compress(b"word " * 50_000)[:-9],
        "cannot be read to its end.*whole copy",
    ),
    "not.jsonl.zst": (b"plain", "cannot be read to its end"),
    "blank.txt": (b" \n\n \n", "no document"),
}


def test_a_file_without_a_document_among_others_is_said_aloud(tmp_path, capsys):
    source = write_jsonl(tmp_path / "in.jsonl", ["one"])
    (tmp_path / "empty.txt").write_text(" \n")
    files = [source, tmp_path / "empty.txt", source]
    assert list(prepare_data.TextDocuments(files, "text")()) == ["one", "one"]
    assert capsys.readouterr().out == f"WARNING: {files[1]} holds no document with text\n"


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_is_refused_in_one_line(tmp_path, model, capsys, name):
    content, message = BAD_INPUTS[name]
    (tmp_path / name).write_bytes(content)
    line = refusal(
        capsys,
        "text",
        tmp_path / name,
        "--out",
        tmp_path / "out",
        "--tokenizer",
        model,
        "--val-fraction",
        "1",
    )
    assert re.search(message, line) and (name in line or name == "blank.txt"), line
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != ".out.lock") == [name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vocab-size", "5000"], "--vocab-size 5000 .*<= "),
        (["--vocab-size", "100"], "--vocab-size 100 "),
        (["--val-fraction", "1"], "no document is left to train a tokenizer on.*--tokenizer"),
        (["--val-fraction", "2"], "--val-fraction"),
        (["--vocab-size", "320", "--val-fraction", "1e-9"], "leaves val without a document"),
        (["--tokenizer", __file__], "test_prepare_data.py is no SentencePiece model"),
        (["--tokenizer", "absent.model"], "absent.model"),
        (["--shard-tokens", "many"], "--shard-tokens.*valid integer"),
        (["--vocab-size", "70000"], "--vocab-size.*65536"),
        (["--colour"], "--colour"),
    ],
)
def test_bad_options_are_refused_in_one_line(tmp_path, capsys, arguments, message):
    source = write_jsonl(tmp_path / "in.jsonl", make_documents(20))
    line = refusal(capsys, "text", source, "--out", tmp_path / "out", "--workers", "1", *arguments)
    assert re.search(message, line), line
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.partial").exists()


def test_damage_is_named_when_the_tokenizer_reads_first(tmp_path, capsys):
    source = write_jsonl(tmp_path / "in.jsonl", make_documents(20))
    source.write_text(source.read_text(encoding="utf-8") + "{", encoding="utf-8")
    line = refusal(
        capsys, "text", source, "--out", tmp_path / "out", "--vocab-size", "320", "--val-docs", "1"
    )
    assert "in.jsonl:21 is no JSON (" in line


def test_a_tokenizer_with_other_ids_is_refused(tmp_path, capsys):
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(make_documents(50)),
        model_prefix=str(tmp_path / "other"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
        bos_id=2,
        eos_id=1,
    )
    source = write_jsonl(tmp_path / "in.jsonl", make_documents(2))
    line = refusal(
        capsys, "text", source, "--out", tmp_path / "out", "--tokenizer", tmp_path / "other.model"
    )
    assert "BOS id 2" in line and "give another --tokenizer" in line


def test_missing_arguments_are_refused_in_one_line(tmp_path, capsys):
    source = write_jsonl(tmp_path / "in.jsonl", make_documents(2))
    assert "--out" in refusal(capsys, "text", source)
    assert "absent.txt" in refusal(
        capsys, "text", tmp_path / "absent.txt", "--out", tmp_path / "out"
    )
    assert "command" in refusal(capsys).lower()


def test_an_unwritable_place_is_refused_in_one_line(tmp_path, made, capsys):
    (tmp_path / "file").write_text("in the way")
    assert "file" in refusal(capsys, *made[1], "--out", tmp_path / "file" / "out")


def test_help_describes_every_option(capsys):
    for command in ("demo", "text", "fineweb"):
        assert run(command, "--help") == 0
        options = re.findall(
            r"^ {2}--(\S+)(.*(?:\n {20,}.*)*)", capsys.readouterr().out, re.MULTILINE
        )
        assert len(options) > 3
        assert all(re.search(r"\s{2,}[A-Z]", text) for _, text in options), options


# ---- Demo


@pytest.fixture
def small_python(tmp_path, monkeypatch):
    """Stand in for what is installed: a library folder and a package that must not be imported."""
    package = tmp_path / "site" / "tinydocs"
    (package / "tests").mkdir(parents=True)
    (tmp_path / "site" / "tinydocs-1.0.dist-info").mkdir()
    (tmp_path / "site" / "tinydocs-1.0.dist-info" / "METADATA").write_text(
        "Name: tinydocs\nVersion: 1.0\n"
    )
    texts = [
        re.sub(r"(\S+ \S+ \S+) ", r"\1 the ", text) for text in make_documents(60)
    ]  # as in English, little words
    for index, text in enumerate(texts):
        source = f'"""{text}"""\nraise ImportError("imported")\n'
        source += f'def f():\n    """{text[:120]} and the end."""\nclass C:\n    "x = 1; y = 2"\n'
        (package / f"m{index}.py").write_text(source, encoding="utf-8")
    (package / "__init__.py").write_text('raise ImportError("imported")\n')
    (package / "copy.py").write_bytes((package / "m1.py").read_bytes())
    (package / "code.py").write_text('"""' + "x = y + z; print(x)\n" * 60 + '"""\n')
    (package / "short.py").write_text('"""Say what it is."""\n')
    (package / "broken.py").write_text('"""' + "the of a " * 90 + '"""\nprint "old"\n')
    (package / "tests" / "test_m.py").write_text(f'"""UNWANTED {texts[0]}"""\n', encoding="utf-8")
    (tmp_path / "lib" / "site-packages").mkdir(parents=True)
    (tmp_path / "lib" / "site-packages" / "other.py").write_text(
        f'"""UNWANTED {texts[0]}"""\n', encoding="utf-8"
    )
    (tmp_path / "lib" / "stdmod.py").write_text(f'"""Standard. {texts[0]}"""\n', encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(prepare_data.sysconfig, "get_path", lambda name: str(tmp_path / "lib"))
    monkeypatch.setattr(prepare_data, "DEMO_PACKAGES", ("tinydocs",))
    monkeypatch.setattr(prepare_data, "topics", {"topic": f"The topic. {texts[1]}"})
    monkeypatch.setattr(prepare_data, "DEMO_MIN_CHARACTERS", 100)
    monkeypatch.setattr(prepare_data, "DEMO_VAL_FRACTION", 0.2)
    return texts


def test_demo_is_the_same_on_every_run(small_python, tmp_path):
    for name, workers in (("a", "1"), ("b", "2")):
        assert (
            run("demo", "--out", tmp_path / name, "--vocab-size", "320", "--workers", workers) == 0
        )
    assert tree_hash(tmp_path / "a") == tree_hash(tmp_path / "b")
    train, val = decoded(tmp_path / "a", "train"), decoded(tmp_path / "a", "val")
    assert not set(train) & set(val) and 5 < len(val) < len(train)
    ends = [f"{text[:120].strip()} and the end." for text in small_python]
    expected = small_python + [end for end in ends if prepare_data.is_demo_document(end)]
    expected += [f"Standard. {small_python[0]}", f"The topic. {small_python[1]}"]
    assert sorted(train + val) == sorted(expected)
    settings = manifest_of(tmp_path / "a")["settings"]
    assert (
        settings["command"] == "demo"
        and settings["tinydocs"] == "1.0"
        and settings["vocab_size"] == 320
    )


def test_demo_names_a_package_that_is_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prepare_data, "DEMO_PACKAGES", ("no_such_package",))
    line = refusal(capsys, "demo", "--out", tmp_path / "out")
    assert "no_such_package" in line and "pip install -r requirements.txt" in line


def test_demo_validation_is_capped(monkeypatch):
    documents = sorted(make_documents(400), key=prepare_data.document_key)
    monkeypatch.setattr(prepare_data, "DEMO_VAL_CHARACTERS", 1000)
    monkeypatch.setattr(prepare_data, "DEMO_VAL_FRACTION", 0.5)
    splitter = prepare_data.Splitter(
        prepare_data.Recipe(val_fraction=prepare_data.demo_val_fraction(documents))
    )
    val = [
        text for text in documents if splitter.split_of(prepare_data.document_key(text)) == "val"
    ]
    assert sum(map(len, val)) >= 1000 > sum(map(len, val[:-1]))


def test_demo_finds_real_packages_without_importing_them():
    script = (
        "import sys, prepare_data; files = prepare_data.demo_files(); "
        "print(len(files), sum('torch' in f.parts for f in files), "
        "'torch' in sys.modules, 'sympy' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    total, of_torch, *imported = done.stdout.split()
    assert int(total) > 2000 and int(of_torch) > 500 and imported == ["False", "False"]


# ---- Download


class StandInHub(http.server.ThreadingHTTPServer):
    """Serves one dataset repository as the hub does.

    `corrupt` and `cut` name files to damage under way.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), StandInHandler)
        self.repo = "some/export"
        self.files: dict[str, bytes] = {}
        self.corrupt: set[str] = set()
        self.cut: set[str] = set()
        self.downloads: list[str] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()


class StandInHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: StandInHub

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body: bool):
        name = self.path.removeprefix(f"/datasets/{self.server.repo}/resolve/main/")
        content = self.server.files.get(name)
        if content is None:
            self.send_response(404)
            self.send_header(
                "X-Error-Code", "EntryNotFound" if name != self.path else "RepoNotFound"
            )
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start = int(re.search(r"\d+", self.headers.get("Range", "0"))[0])
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("X-Repo-Commit", "c" * 40)
        self.send_header("X-Linked-Size", str(len(content)))
        if name.endswith(
            (".bin", ".model")
        ):  # large files are known by their sha256, others by git's hash
            self.send_header("X-Linked-Etag", f'"{hashlib.sha256(content).hexdigest()}"')
        blob = b"blob %d\0" % len(content) + content
        self.send_header("ETag", f'"{hashlib.sha1(blob).hexdigest()}"')
        self.end_headers()
        if not body:
            return
        self.server.downloads.append(name.rsplit("/", 1)[1])
        if name in self.server.corrupt:
            content = content[:-2] + bytes(2)
        if name in self.server.cut:
            content, self.close_connection = content[: len(content) // 2], True
        self.wfile.write(content[start:])


SHARDS = "datasets/datasets/fineweb10B_sp1024/"


@pytest.fixture
def hub(model):
    """The stand-in hub with one validation and three training shards of 1,000 tokens."""
    server = StandInHub()
    draw = np.random.default_rng(0)
    for name in ("val_000000", "train_000000", "train_000001", "train_000002"):
        tokens = draw.integers(4, 320, 1000, dtype="<u2")
        tokens[[0, 100, 600]] = 1
        header = np.zeros(256, dtype="<i4")
        header[:3] = 20240520, 1, len(tokens)
        server.files[f"{SHARDS}fineweb_{name}.bin"] = header.tobytes() + tokens.tobytes()
    server.files["datasets/tokenizers/fineweb_1024_bpe.model"] = model.read_bytes()
    listing = {
        "datasets": [
            {
                "name": "fineweb10B_sp1024",
                "tokenizer_name": "sp_bpe_1024",
                "stats": {"files_train": 3, "files_val": 1},
            },
            {
                "name": "fineweb10B_byte260",
                "tokenizer_name": "bytes",
                "stats": {"files_train": 3, "files_val": 1},
            },
        ],
        "tokenizers": [
            {"name": "sp_bpe_1024", "model_path": "tokenizers/fineweb_1024_bpe.model"},
            {"name": "bytes", "path": "tokenizers/bytes.json"},
        ],
    }
    server.files["datasets/manifest.json"] = json.dumps(listing).encode()
    yield server
    server.shutdown()
    server.server_close()


def fetch(hub: StandInHub, out: Path, *options, code: int) -> str:
    """Run the fineweb command against the stand-in; return what it says.

    Where it refuses, that is one line.
    """
    hub.downloads.clear()
    command = [sys.executable, ROOT / "prepare_data.py", "fineweb", "--out", out, *options]
    environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    environment.update(
        HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}",
        HF_HOME=str(out / "hf"),
        HF_HUB_DISABLE_XET="1",
        MATCHED_FINEWEB_REPO_ID="some/export",
    )
    done = subprocess.run(
        [str(part) for part in command],
        env=environment,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stderr
    if code == 0:
        return done.stdout
    lines = [
        line for line in done.stderr.splitlines() if line.startswith("prepare_data.py: error:")
    ]
    assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    return lines[0]


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_fineweb_is_downloaded_verified_and_extended(hub, tmp_path, model):
    fetch(hub, tmp_path, "--train-shards", "2", code=0)
    folder = tmp_path / "datasets" / "fineweb10B_sp1024"
    shards = ["fineweb_train_000000.bin", "fineweb_train_000001.bin", "fineweb_val_000000.bin"]
    assert names_in(folder) == [*shards, "manifest.json"]
    for name in shards:
        assert (folder / name).read_bytes() == hub.files[SHARDS + name]
    assert (tmp_path / "tokenizers" / "fineweb_1024_bpe.model").read_bytes() == model.read_bytes()
    manifest = manifest_of(folder)
    assert len(shard_tokens(folder, "train")) == 2000 and len(shard_tokens(folder, "val")) == 1000
    train = dict.fromkeys(prepare_data.TOTALS) | {"documents": 6, "tokens": 2000}
    assert manifest["splits"]["train"] == train
    assert manifest["disjoint"] is None and manifest["tokenizer"]["vocab_size"] == 320
    assert (folder / manifest["tokenizer"]["file"]).read_bytes() == model.read_bytes()
    assert not (folder.parent / ".fineweb10B_sp1024.partial").exists()

    assert "nothing to do" in fetch(hub, tmp_path, "--train-shards", "2", code=0)
    assert hub.downloads == []
    line = fetch(hub, tmp_path, "--train-shards", "3", "--prefix", "other", code=2)
    assert 'prefix = "datasets", not "other"' in line
    fetch(hub, tmp_path, "--train-shards", "3", code=0)
    assert hub.downloads == ["manifest.json", "fineweb_train_000002.bin"]
    assert manifest_of(folder)["splits"]["train"]["tokens"] == 3000
    line = fetch(hub, tmp_path, "--train-shards", "1", code=2)
    assert "train_shards = 3, not 1" in line and "choose another --out" in line


@pytest.mark.parametrize("damage", ["cut", "corrupt"])
def test_fineweb_damaged_download_is_refused_and_taken_up_again(hub, tmp_path, damage):
    getattr(hub, damage).add(SHARDS + "fineweb_train_000001.bin")
    line = fetch(hub, tmp_path, "--train-shards", "3", code=2)
    assert "run again" in line and ("fineweb_train_000001.bin" in line or damage == "cut")
    folder = tmp_path / "datasets" / "fineweb10B_sp1024"
    assert names_in(folder) == ["fineweb_train_000000.bin", "fineweb_val_000000.bin"]
    getattr(hub, damage).clear()
    fetch(hub, tmp_path, "--train-shards", "3", code=0)
    taken_up = ["fineweb_train_000001.bin", "fineweb_train_000002.bin", "manifest.json"]
    assert sorted(set(hub.downloads)) == taken_up
    assert len(shard_tokens(folder, "train")) == 3000


def test_fineweb_refuses_what_is_no_shard_of_this_vocabulary(hub, tmp_path):
    name = SHARDS + "fineweb_val_000000.bin"
    whole = hub.files[name]
    for content, message in (
        (whole[:-2], "states 1000 tokens and holds 999"),
        (bytes(1024) + whole[1024:], "no shard header"),
        (whole[:500], "no shard header"),
        (whole[:-2] + b"\x40\x01", "has token 320, its tokenizer 320"),
    ):
        hub.files[name] = content
        line = fetch(hub, tmp_path, "--train-shards", "0", code=2)
        assert "fineweb_val_000000.bin" in line and message in line
        assert names_in(tmp_path / "datasets" / "fineweb10B_sp1024") == []


def test_fineweb_refuses_wrong_options_and_changed_files(hub, tmp_path):
    assert "choose one of byte260, sp1024" in fetch(hub, tmp_path, "--variant", "sp9", code=2)
    assert "named sp<size>" in fetch(
        hub, tmp_path, "--variant", "byte260", "--train-shards", "1", code=2
    )
    assert "take 3" in fetch(hub, tmp_path, "--train-shards", "4", code=2)
    assert "check the network" in fetch(hub, tmp_path, "--prefix", "elsewhere", code=2)
    assert "download from a//b failed" in fetch(hub, tmp_path, "--repo", "a//b", code=2)
    local = tmp_path / "datasets" / "fineweb10B_sp1024" / "fineweb_val_000000.bin"
    local.parent.mkdir(parents=True, exist_ok=True)
    local.write_bytes(b"mine")
    line = fetch(hub, tmp_path, "--train-shards", "0", code=2)
    assert (
        str(local) in line and "delete it and run again" in line and local.read_bytes() == b"mine"
    )


def test_fineweb_of_a_larger_vocabulary_comes_from_the_repository_that_has_it(hub, tmp_path):
    """As the records' READMEs have it: MATCHED_FINEWEB_REPO_ID, or --repo, and --variant sp8192."""
    size = 8192
    variant = f"sp{size}"
    line = fetch(hub, tmp_path, "--variant", variant, code=2)
    assert "choose one of byte260, sp1024, or another --repo" in line
    hub.repo = "kevclark/parameter-golf"
    assert prepare_data.EXPORTS[variant].repo == hub.repo
    listing = hub.files["datasets/manifest.json"].decode()
    hub.files = {
        name.replace("sp1024", variant).replace("fineweb_1024", f"fineweb_{size}"): content
        for name, content in hub.files.items()
    }
    listing = listing.replace("sp1024", variant).replace("1024", str(size))
    hub.files["datasets/manifest.json"] = listing.encode()
    # the listing of the repository that was asked before is forgotten
    options = ("--variant", variant, "--train-shards", "1", "--repo", hub.repo)
    said = fetch(hub, tmp_path, *options, code=0).splitlines()[-1]

    # what it says to train with is what a launch with the records' own two settings finds
    folder = tmp_path / "datasets" / f"fineweb10B_{variant}"
    tokenizer = tmp_path / "tokenizers" / f"fineweb_{size}_bpe.model"
    assert said == f"train with DATA_PATH={folder} TOKENIZER_PATH={tokenizer} VOCAB_SIZE=320"
    cfg = train_gpt.Config.from_env({}, [f"DATA_DIR={tmp_path}", f"VOCAB_SIZE={size}"])
    assert (cfg.data_path, cfg.tokenizer_path) == (str(folder), str(tokenizer))
    assert train_gpt.Split(cfg, "train").tokens == 1000
    assert manifest_of(folder)["settings"]["repo"] == hub.repo


def test_fineweb_of_caseops_lies_where_the_records_commands_look_for_it(hub, tmp_path):
    """With its side-car, from its own repository: --variant caseops names none."""
    hub.repo = "romeerp/parameter-golf-caseops-v1"
    name = "fineweb10B_sp8192_lossless_caps_caseops_v1_reserved"
    pieces = "fineweb_8192_bpe_lossless_caps_caseops_v1_reserved"
    listing = hub.files.pop("datasets/manifest.json").decode()
    listing = listing.replace("fineweb10B_sp1024", name).replace("fineweb_1024_bpe", pieces)
    without = listing
    listing = listing.replace('"stats"', '"val_bytes_glob": "fineweb_val_bytes_*.bin", "stats"')
    hub.files = {
        path.replace("fineweb10B_sp1024", name).replace("fineweb_1024_bpe", pieces): content
        for path, content in hub.files.items()
    }
    hub.files["datasets/manifest.json"] = without.encode()
    shard = hub.files[f"datasets/datasets/{name}/fineweb_val_000000.bin"]
    remote = f"datasets/datasets/{name}/fineweb_val_bytes_000000.bin"
    header = np.array([20240520, 1, 999, *[0] * 253], "<i4").tobytes()
    hub.files[remote] = header + b"\xff\xff" * 999

    options = ("--variant", "caseops", "--train-shards", "1", "--repo", "")
    root = tmp_path / prepare_data.EXPORTS[prepare_data.CASEOPS_VARIANT].out
    assert "has no side-cars there" in fetch(hub, root, *options, code=2)
    assert not any(path.endswith(".bin") for path in hub.downloads)
    hub.files["datasets/manifest.json"] = listing.encode()
    line = fetch(hub, root, *options, code=2)
    assert "fineweb_val_bytes_000000.bin has 999 numbers for the 1000 tokens of" in line
    hub.files[remote] = shard[:1024] + b"\xff\xff" * 1000
    said = fetch(hub, root, *options, code=0)
    assert "warning: 3 validation documents, where the challenge has 50,000" in said
    # one that an older script made, without them
    local = root / "datasets" / name
    manifest = manifest_of(local)
    manifest["shards"] = [e for e in manifest["shards"] if e["split"] != "val_bytes"]
    (local / "manifest.json").write_text(json.dumps(manifest))
    (local / "fineweb_val_bytes_000000.bin").unlink()
    fetch(hub, root, *options, code=0)
    cfg = train_gpt.Config.from_env({}, [f"DATA_DIR={tmp_path / 'data'}", "CASEOPS_ENABLED=1"])
    folder = Path(cfg.data_path)
    assert folder == root / "datasets" / name and Path(cfg.tokenizer_path).exists()
    side_car = "fineweb_val_bytes_000000.bin"
    assert names_in(folder) == [
        "fineweb_train_000000.bin",
        "fineweb_val_000000.bin",
        side_car,
        "manifest.json",
    ]
    manifest = manifest_of(folder)
    assert [e["split"] for e in manifest["shards"]] == ["val", "val_bytes", "train"]
    assert manifest["settings"]["repo"] == hub.repo
    assert manifest["splits"]["val"]["tokens"] == 1000


def test_fineweb_damaged_listing_is_refused(hub, tmp_path):
    hub.corrupt.add("datasets/manifest.json")
    assert "is not the published file" in fetch(hub, tmp_path, "--train-shards", "1", code=2)
    hub.corrupt.clear()
    fetch(hub, tmp_path, "--train-shards", "1", code=0)
