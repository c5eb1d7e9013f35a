"""Capitals as operators, and the bytes of what their tokens stand for.

Failures that these tests would have caught: operators counted as three bytes each, or the bytes of
the text in small letters (#1184 lost 93 % of its gain once it counted right); a decoder that raises
at a loose accent (#1729's, at 1 of 35 strings); 10,000 validation documents in place of 50,000
(#2127); a side-car of other data, read as if it were this one's.
"""

import json
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, read_shard, write_shard
from hypothesis import given
from hypothesis import strategies as st

import prepare_data
import train_gpt
from prepare_data import NORMALIZER, CaseOps, Codec
from train_gpt import BOS, Config, Refusal, Split, Validation

GOLDEN = ROOT / "tests" / "golden"
OFFICIAL = GOLDEN / "fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model"
CASES = json.loads((GOLDEN / "caseops.json").read_text(encoding="utf-8"))["cases"]
CODEC = Codec(prepare_data.load_tokenizer(OFFICIAL))
TABLE = prepare_data.byte_table(OFFICIAL)
TITLE, ALLCAPS, NEXT, ESCAPE = CaseOps.OPERATORS
# Letters, marks that join them, what normalising changes, operators
ALPHABET = st.sampled_from([*"aAbBzZ eEhHjJıİßﬁ™… \n.1é\u0301\u0331\u030c日▁", *CaseOps.OPERATORS])
TEXT = st.text(st.one_of(ALPHABET, st.characters(codec="utf-8")), max_size=40)


def bytes_of(text: str) -> int:
    """UTF-8 bytes of what decode makes of a text, by hand: operators that act have none."""
    size = 0
    escaped = False
    for character in text:
        acts = character in CaseOps.OPERATORS and not escaped
        escaped = acts and character == ESCAPE
        size += 0 if acts else len(character.encode())
    return size


# ── The text ──────────────────────────────────────────────────────────────────────────────────────
def test_the_operators_are_the_same_characters_in_both_scripts():
    assert train_gpt.ByteTable.OPERATORS == CaseOps.OPERATORS
    assert CODEC.caseops and TABLE.caseops
    assert CODEC.tokenizer.piece_to_id(list(CaseOps.OPERATORS)) == [4, 5, 6, 7]


@pytest.mark.parametrize("case", CASES, ids=[ascii(case["text"]) for case in CASES])
def test_text_tokens_and_side_car_are_those_of_the_record(case):
    text = case["text"]
    coded = CaseOps.encode(text)
    assert [ord(character) for character in coded] == case["transformed_code_points"]
    assert CaseOps.decode(coded) == text
    assert CODEC.tokenizer.encode(coded) == case["caseops_ids"]
    # theirs raises, where it has null
    normalised = NORMALIZER.normalize(text)
    restored = case["caseops_restored_text"]
    assert CODEC.decode(case["caseops_ids"]) == (normalised if restored is None else restored)

    tokens = np.array([BOS, *CODEC.encode(text)], "<u2")
    assert tokens[1:].tolist() == CODEC.tokenizer.encode(CaseOps.encode(normalised))
    sizes = prepare_data.side_car(TABLE, tokens)
    if text == normalised:
        assert tokens[1:].tolist() == case["caseops_ids"]
        assert sizes.tolist() == [0, *case["caseops_sidecar_bytes"]]
    # where it is not, theirs counts what is folded away, too
    spelt = NORMALIZER.normalize(CODEC.decode(tokens[1:].tolist()))
    assert spelt == normalised and sizes.sum() == len(normalised.encode())


@given(TEXT)
def test_every_text_comes_back_from_its_operators(text):
    assert CaseOps.decode(CaseOps.encode(text)) == text
    assert not any("A" <= character <= "Z" for character in CaseOps.encode(text))


@given(TEXT)
def test_decoding_never_raises_and_takes_away_the_operators_that_act(text):
    assert len(CaseOps.decode(text).encode()) == bytes_of(text)


@pytest.mark.parametrize(
    ("text", "decoded"),
    [
        (TITLE, ""),
        (ALLCAPS + " a", " a"),
        (NEXT + TITLE + "a", "A"),
        (TITLE + ESCAPE + NEXT, NEXT),
        (ESCAPE, ""),
        ("a" + TITLE + "b" + ALLCAPS + "cd", "aBCD"),
        # "É" and "H̱" of a capital, a loose mark, and a tokenizer that joined them behind TITLE
        (TITLE + "é", "É"),
        (TITLE + "\u1e96", "H\u0331"),
        (TITLE + "1", "1"),
    ],
)
def test_operators_where_no_encoder_puts_them_do_what_they_can(text, decoded):
    assert CaseOps.decode(text) == decoded


@given(TEXT)
def test_tokens_give_the_normalised_text_and_its_bytes_back(text):
    tokens = CODEC.encode(text)
    stream = np.array([BOS, *tokens], "<u2")
    decoded = CODEC.decode(tokens)
    size = len(decoded.encode())
    assert TABLE.count(stream).sum() == prepare_data.side_car(TABLE, stream).sum() == size
    normalised = NORMALIZER.normalize(text)
    if not set(normalised) & set("\u0301\u0331\u030c▁") and normalised.isascii():
        assert decoded == normalised


@given(st.lists(st.sampled_from([BOS, 4, 5, 6, 7, 7, 7, 8136, 8133, 203, 177])))
def test_operators_that_act_are_those_that_no_escape_makes_text(ids):
    acts = []
    escaped = False
    for token in ids:
        acts.append(4 <= token <= 7 and not escaped)
        escaped = acts[-1] and token == 7
    assert TABLE.acting(np.array(ids, int)).tolist() == acts


@pytest.mark.skipif("GOLF_DATA" not in os.environ, reason="GOLF_DATA names no folder of real data")
def test_the_902_official_documents_have_2504867_bytes_in_tokens_of_caseops():
    path = Path(os.environ["GOLF_DATA"], "fineweb_val_head", "docs.jsonl")
    texts = [json.loads(line)["text"] for line in path.open(encoding="utf-8")]
    total = tokens = 0
    for document in prepare_data.encode_batch(OFFICIAL, texts):
        sizes = prepare_data.side_car(TABLE, document.tokens)
        assert sizes.sum() == document.utf8_bytes and not document.altered
        total += int(sizes.sum())
        tokens += len(sizes)
    assert (len(texts), total, tokens) == (902, 2_504_867, 808_827)


# ── The shards ────────────────────────────────────────────────────────────────────────────────────
def texts_of(count: int) -> list[str]:
    """Beginnings of Python's own help, with what normalising folds and with operators."""
    topics = [text[:2500] for _, text in sorted(prepare_data.topics.items())][:count]
    return [f"{text}\nNaïve McDonald's “日本”  iPhone {ESCAPE}" for text in topics]


def prepare(source: Path, out: Path, *options) -> int:
    arguments = ("text", source, "--out", out, "--workers", "1", *options)
    return prepare_data.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def made(tmp_path_factory, worker_id) -> tuple[Path, list[str]]:
    """(a folder of CaseOps data with a tokenizer of its own, its documents)."""
    folder = tmp_path_factory.mktemp("caseops")
    texts = texts_of(40)
    source = folder / "in.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = ("--transform", "caseops", "--vocab-size", "384", "--val-docs", "6")
    assert prepare(source, folder / "data", *options, "--shard-tokens", "3000") == 0
    return folder / "data", texts


def test_shards_side_car_and_manifest_say_the_same(made):
    folder, texts = made
    manifest = json.loads((folder / "manifest.json").read_text())
    files = {entry["file"]: entry for entry in manifest["shards"]}
    shards = sorted(folder.glob("fineweb_val_0*.bin"))
    side_cars = sorted(folder.glob("fineweb_val_bytes_*.bin"))
    assert [path.name.replace("bytes_", "") for path in side_cars] == [p.name for p in shards]
    assert len(shards) > 1
    for shard, side_car in zip(shards, side_cars, strict=True):
        numbers = read_shard(side_car)
        assert files[side_car.name]["tokens"] == len(numbers) == len(read_shard(shard))
        assert files[side_car.name]["sha256"] == prepare_data.file_sha256(side_car)
        assert files[side_car.name]["split"] == "val_bytes"

    tokens = np.concatenate([read_shard(path) for path in shards])
    sizes = np.concatenate([read_shard(path) for path in side_cars])
    codec = Codec(prepare_data.load_tokenizer(folder / "tokenizer.model"))
    starts = np.flatnonzero(tokens == BOS)
    ends = [*starts[1:], len(tokens)]
    for text, start, end in zip(texts[:6], starts, ends, strict=True):
        normalised = NORMALIZER.normalize(text)
        assert codec.decode(tokens[start + 1 : end].tolist()) == normalised
        assert sizes[start:end].sum() == len(normalised.encode())
    assert manifest["splits"]["val"]["utf8_bytes"] == sizes.sum()
    assert manifest["splits"]["val"]["tokens"] == len(tokens)
    assert manifest["splits"]["val"]["altered_documents"] == 0
    assert manifest["disjoint"]["shared"] == 0 and manifest["disjoint"]["val_documents"] == 6
    assert manifest["settings"]["transform"] == "caseops"


def test_a_tokenizer_and_a_transform_that_do_not_fit_are_refused(made, data, tmp_path, capsys):
    source = made[0].parent / "in.jsonl"
    plain, caseops = data / "tokenizer.model", made[0] / "tokenizer.model"
    assert prepare(source, tmp_path / "a", "--tokenizer", caseops) == 2
    assert "is one of CaseOps: add --transform caseops" in capsys.readouterr().err
    assert prepare(source, tmp_path / "a", "--tokenizer", plain, "--transform", "caseops") == 2
    assert "has no pieces for the four operators" in capsys.readouterr().err


def test_no_more_documents_are_held_out_by_default_than_the_challenge_has(monkeypatch):
    assert prepare_data.MAX_VAL_DOCUMENTS == 50_000
    monkeypatch.setattr(prepare_data, "MAX_VAL_DOCUMENTS", 3)
    for recipe, held_out in (
        (prepare_data.Recipe(val_fraction=1), 3),
        (prepare_data.Recipe(val_docs=5), 5),
    ):
        splitter = prepare_data.Splitter(recipe)
        sides = [splitter.split_of(bytes([number]) * 16) for number in range(8)]
        assert sides.count("val") == held_out and sides.count("train") == 8 - held_out
        assert prepare_data.proof_of_disjoint(splitter)["shared"] == 0


# ── The score ─────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture
def folder(made, tmp_path) -> Path:
    """A copy of the data, to be changed."""
    return Path(shutil.copytree(made[0], tmp_path / "data"))


def config(folder: Path, **knobs) -> Config:
    paths = dict(data_path=str(folder), tokenizer_path=str(folder / "tokenizer.model"))
    return Config(**{"vocab_size": 384, "val_max_tokens": 0, **paths, **knobs})


def validation(folder: Path, **knobs) -> Validation:
    cfg = config(folder, **knobs)
    run = SimpleNamespace(world=1, rank=0, cuda=False, device=torch.device("cpu"))
    return Validation(cfg, run, Split(cfg, "val"))


def refusal(folder: Path, **knobs) -> str:
    with pytest.raises(Refusal) as refused:
        validation(folder, **knobs)
    assert len(str(refused.value).splitlines()) == 1 and refused.value.code == 2
    return str(refused.value)


def side_cars(folder: Path) -> list[Path]:
    return sorted(folder.glob("fineweb_val_bytes_*.bin"))


def numbers_of(folder: Path) -> np.ndarray:
    return np.concatenate([read_shard(path) for path in side_cars(folder)]).astype(int)


@pytest.mark.parametrize("limit", [0, 4_000, 500])
def test_each_target_has_the_bytes_of_the_side_car(made, limit):
    val = validation(made[0], val_max_tokens=limit, caseops_enabled=True)
    numbers = numbers_of(made[0])[1 : limit + 1 if limit else None]
    assert val.target_bytes.tolist() == numbers.tolist() and val.n == len(numbers)
    assert val.facts()["side_car"] == f"used: {numbers.sum():,} bytes, as the tokens spell"
    assert val.warnings(None) == []
    check = val.checked
    assert limit or check.bytes == check.of_bytes == numbers.sum()


def change(folder: Path, numbers: np.ndarray) -> None:
    """Write these numbers over those of the side-cars."""
    edges = np.cumsum([len(read_shard(path)) for path in side_cars(folder)])
    for path, part in zip(side_cars(folder), np.split(numbers, edges[:-1]), strict=True):
        write_shard(path, part)


def test_a_training_is_scored_by_the_bytes_that_a_hand_counts(made, folder, tiny):
    """And by those that the tokens spell where a published side-car has three bytes more."""
    numbers = numbers_of(folder)
    numbers[np.flatnonzero(numbers)[:3]] += 1
    change(folder, numbers)
    (folder / "manifest.json").unlink()
    paths = dict(data_path=str(folder), tokenizer_path=str(folder / "tokenizer.model"))
    knobs = dict(num_layers=1, eval_stride=0, smear_gate=False, warmdown_iters=0, iterations=1)
    result = train_gpt.main(tiny(**paths, **knobs, val_max_tokens=0, caseops_enabled=True))
    size = sum(len(NORMALIZER.normalize(text).encode()) for text in made[1][:6])
    assert result["val_bytes"] == size + 3 and result["data"]["spelt_bytes"] == size
    bits = result["val_loss"] * result["val_tokens"] / math.log(2)
    assert result["val_bpb"] == pytest.approx(bits / (size + 3), rel=1e-9)
    assert result["val_bpb_as_spelt"] == pytest.approx(bits / size, rel=1e-9)
    assert f", {bits / size:.6f} by the bytes" in train_gpt.result_line(result)


def test_a_side_car_that_is_missing_short_or_of_other_tokens_is_refused(folder):
    numbers = numbers_of(folder)
    change(folder, np.roll(numbers, 1))
    assert "fineweb_val_bytes_000000.bin: states" in refusal(folder)
    change(folder, numbers + (numbers > 0) * (np.arange(len(numbers)) % 20 == 0))
    assert "of another text" in refusal(folder)
    change(folder, numbers)
    validation(folder)

    last = side_cars(folder)[-1]
    write_shard(last, read_shard(last)[:-1])
    assert f"{last.name}: " in refusal(folder) and "numbers for the" in refusal(folder)
    last.unlink()
    assert f"{last.name}: no such side-car" in refusal(folder)
    for path in side_cars(folder):
        path.unlink()
    line = refusal(folder)
    assert "no fineweb_val_bytes_*.bin" in line and "--transform caseops" in line


def test_a_side_car_without_its_shard_is_refused(folder):
    write_shard(folder / "fineweb_val_bytes_000009.bin", [1])
    assert "fineweb_val_bytes_000009.bin: a side-car without its shard" in refusal(folder)


def test_data_without_operators_is_refused_where_caseops_is_asked_for(data):
    assert validation(data).facts()["side_car"] == "none"
    line = refusal(data, caseops_enabled=True)
    assert line.startswith("CASEOPS_ENABLED=1: ") and "no operators" in line


def test_a_manifest_holds_the_side_car_to_its_hash(folder):
    cfg = config(folder)
    splits = {name: Split(cfg, name) for name in ("val", "train")}
    assert train_gpt.check_data(cfg, splits)["manifest"].startswith("agrees")
    numbers = numbers_of(folder)
    numbers[50:52] += [1, -1]
    change(folder, numbers)
    with pytest.raises(Refusal, match="fineweb_val_bytes_00000"):
        train_gpt.check_data(cfg, splits)


def test_a_published_side_car_of_text_as_it_came_is_used_and_said_aloud(folder):
    """Theirs counts both of two spaces that the tokens fold into one."""
    numbers = numbers_of(folder)
    numbers[np.flatnonzero(numbers)[:3]] += 1
    change(folder, numbers)
    val = validation(folder)
    assert val.target_bytes.sum() == numbers.sum()
    assert val.facts()["side_car"].endswith("+3 beside what the tokens spell")
    (warning,) = val.warnings(None)
    assert f"BPB is {-3 / numbers.sum():+.3%} off" in warning


def test_other_tokenizers_are_scored_by_the_challenges_rule_whatever_lies_there(data, tmp_path):
    folder = Path(shutil.copytree(data, tmp_path / "data"))
    rule = validation(folder).target_bytes
    numbers = np.append(0, rule.numpy())
    write_shard(folder / "fineweb_val_bytes_000000.bin", numbers)
    assert validation(folder).facts()["side_car"] == "states the same bytes"
    numbers[50] += 1
    write_shard(folder / "fineweb_val_bytes_000000.bin", numbers)
    val = validation(folder)
    assert val.facts()["side_car"] == f"states {numbers.sum():,} bytes, not used"
    assert torch.equal(val.target_bytes, rule) and val.warnings(None) == []
    write_shard(folder / "fineweb_val_bytes_000000.bin", np.roll(numbers, 1))
    assert "of another text" in refusal(folder)
