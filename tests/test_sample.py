"""Text from an artifact is what the scored model says, and bad input is one line.

Would have caught: a second forward pass without the document masks of the first, a window longer
than a row, a seed that does not reproduce, half characters on the screen, a text decoded with
another tokenizer than the run's.
"""

import hashlib
import json
import shutil

import pytest
import sentencepiece
import torch
from pages_demo import DEMO

import sample
import train_gpt
from prepare_data import CaseOps, Codec
from sample import choose, log_probabilities
from train_gpt import BOS, GPT, Score

PROMPT = "The statement"


@pytest.fixture
def artifact(tiny, data, tmp_path):
    """artifact(**knobs) -> the path of one with random weights, a tokenizer beside it."""

    def make(**knobs):
        cfg = tiny(**knobs)
        torch.manual_seed(0)
        model = GPT(cfg)
        state = {n: p.detach() + 0.1 * torch.randn(p.shape) for n, p in model.named_parameters()}
        parts = train_gpt.quantised(cfg, state, train_gpt.export_plan(cfg, model))
        path = tmp_path / "artifact.bin"
        path.write_bytes(train_gpt.encode_artifact(cfg, parts))
        shutil.copy(data / "tokenizer.model", tmp_path)
        return path

    return make


@pytest.fixture
def said(capsys):
    """said(*arguments) -> (exit code, stdout, stderr)."""

    def call(*arguments) -> tuple[int, str, str]:
        code = sample.main([*map(str, arguments)])
        return code, *capsys.readouterr()

    return call


# ── The model ─────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("masked", [False, True])
def test_the_probabilities_are_those_of_scoring(artifact, run, tiny, masked):
    """Of every target, in windows of stride 1, over a document's start."""
    rows = dict(train_seq_len=16, train_batch_tokens=64, eval_stride=1)
    path = artifact(**rows, doc_mask=masked, smear_mask_bos=masked)
    cfg, model = sample.read_model(path)
    ids = [BOS, *torch.randint(4, 384, (40,), generator=torch.Generator().manual_seed(0)).tolist()]
    ids[20] = BOS

    class Text:
        tokens = torch.tensor(ids)
        n = len(ids) - 1
        target_bytes = torch.ones(n)
        tilt = None

    sheet = train_gpt.ScoreSheet(cfg, run, Text, Text.n)
    sheet.fill(model, train_gpt.windows(0, Text.n, cfg.window, cfg.eval_stride))
    assert isinstance(sheet.total(), Score)
    places = range(1, len(ids))
    own = [-log_probabilities(model, ids[:n], cfg.window)[ids[n]].item() for n in places]
    assert own == pytest.approx(sheet.nats[:-1].tolist(), abs=1e-4)


def test_all_probabilities_are_one(artifact):
    cfg, model = sample.read_model(artifact())
    log_p = log_probabilities(model, [BOS, 5, 6], cfg.window)
    assert log_p.shape == (384,) and log_p.exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_weights_that_give_no_probabilities_are_refused(artifact, said, monkeypatch):
    monkeypatch.setattr(GPT, "forward", lambda *_: torch.full((384, 1, 1), torch.nan))
    code, _, told = said(artifact(), PROMPT)
    assert code == 5 and told.endswith("(NaN): export it again\n")


# ── The draws ─────────────────────────────────────────────────────────────────────────────────────
def drawn(log_p, temperature=1.0, top_p=1.0, times=300) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    return [choose(log_p, temperature, top_p, generator) for _ in range(times)]


P = torch.tensor([0.1, 0.5, 0.15, 0.25], dtype=torch.float64)


@pytest.mark.parametrize(
    "top_p, kept",
    [(1.0, {0, 1, 2, 3}), (0.89, {1, 2, 3}), (0.75, {1, 3}), (0.74, {1, 3}), (0.5, {1})],
)
def test_the_nucleus_is_the_fewest_tokens_that_have_top_p(top_p, kept):
    assert {*drawn(P.log(), top_p=top_p)} == kept


def test_the_temperature_divides_the_logits():
    assert drawn(P.log(), 0.5) == drawn((P.square() / P.square().sum()).log())
    assert drawn(P.log(), 0.5) != drawn(P.log())
    share = drawn(P.log(), times=2000).count(1) / 2000
    assert abs(share - 0.5) < 0.06
    assert {*drawn(P.log(), 1e-300)} == {*drawn(P.log(), 0.0)} == {1}


# ── The text ──────────────────────────────────────────────────────────────────────────────────────
def test_greedy_is_deterministic_and_a_seed_reproduces(artifact, said):
    path = artifact()

    def text(*options) -> str:
        code, text, told = said(path, PROMPT, "--tokens", 12, *options)
        assert (code, text[: len(PROMPT)]) == (0, PROMPT) and told.startswith("12 tokens, as many ")
        return text

    greedy = ("--temperature", 0)
    assert text(*greedy) == text(*greedy, "--seed", 2) == text(*greedy, "--top-p", 0.1)
    assert text() == text("--seed", 1) != text("--seed", 2)
    assert text("--top-p", 1e-9) == text(*greedy) != text()


def test_the_text_ends_where_the_model_begins_another_document(artifact, said, monkeypatch):
    calls = []

    def scripted(model, ids, window):
        calls.append(ids)
        return torch.eye(384)[[40, 41, BOS][len(calls) - 1]].double()

    monkeypatch.setattr(sample, "log_probabilities", scripted)
    code, text, told = said(artifact(), PROMPT, "--temperature", 0)
    assert code == 0 and told.startswith("2 tokens, then the document ends (BOS); ")
    assert "s of CPU" in told and told.count("\n") == 1
    assert calls[0][0] == BOS and BOS not in calls[-1][1:] and calls[-1][-2:] == [40, 41]
    assert text.count("\n") == 1


def test_a_character_of_several_tokens_comes_whole_and_none_twice(data, capsys):
    model_file = str(data / "tokenizer.model")
    codec = Codec(sentencepiece.SentencePieceProcessor(model_file=model_file))
    spelt = "a naïve 日本 café 🙂 end"
    tokens = codec.encode(spelt)
    writer = sample.Writer(codec)
    shown = []
    for n in range(len(tokens)):
        writer.write(tokens[: n + 1])
        shown.append(capsys.readouterr().out)
    assert "".join(shown) == codec.decode(tokens) == spelt
    assert len([part for part in shown if part]) > 10

    # bytes that are no character show once nothing can complete them
    cut = tokens[: shown.index("本")]
    assert cut and codec.decode(cut).endswith("\ufffd")
    writer = sample.Writer(codec)
    writer.write(cut)
    begun = capsys.readouterr().out
    writer.write(cut, complete=True)
    assert begun + capsys.readouterr().out == codec.decode(cut) and "\ufffd" not in begun


class Letters:
    """A tokenizer with a token per character."""

    def piece_to_id(self, piece):
        return ord(piece)

    def unk_id(self):
        return 0

    def decode(self, tokens):
        return "".join(map(chr, tokens))

    def encode(self, text):
        return [*map(ord, text)]


def test_operators_of_caseops_are_carried_out(capsys):
    codec = Codec(Letters())
    writer = sample.Writer(codec)
    spelt = "The NASA mcKay \ue001 x"
    tokens = sample.encode_prompt(codec, spelt)[1:]
    assert "".join(map(chr, tokens)) == CaseOps.encode(spelt) != spelt
    for n in range(len(tokens)):
        writer.write(tokens[: n + 1])
    assert capsys.readouterr().out == sample.on_screen(spelt)


def test_no_character_commands_the_terminal():
    assert sample.on_screen("a\x1b[2Jb\nc\u202e") == "a\\x1b[2Jb\nc\\u202e"


# ── The tokenizer ─────────────────────────────────────────────────────────────────────────────────
def test_the_tokenizer_is_beside_the_artifact_or_that_of_its_run_or_given(artifact, said, data):
    path = artifact()
    beside = path.with_name("tokenizer.model")
    texts = [said(path.parent, PROMPT, "--tokens", 3)]  # the folder of a run, too

    def result(sha256: str) -> None:
        made = json.loads((DEMO / "result.json").read_text())
        made["config"]["tokenizer_path"] = str(data / "tokenizer.model")
        made["data"]["tokenizer_sha256"] = sha256
        (path.parent / "result.json").write_text(json.dumps(made))

    beside.rename(path.with_name("moved"))
    code, _, told = said(path, PROMPT)
    assert code == 2 and f"{beside}: no tokenizer there; give the one" in told
    texts.append(said(path, PROMPT, "--tokens", 3, "--tokenizer", path.with_name("moved")))
    result(hashlib.sha256((data / "tokenizer.model").read_bytes()).hexdigest())
    texts.append(said(path, PROMPT, "--tokens", 3))
    assert [code for code, _, _ in texts] == [0, 0, 0] and len({text for _, text, _ in texts}) == 1

    result("0" * 64)
    for given in ((), ("--tokenizer", path.with_name("moved"))):
        code, _, told = said(path, PROMPT, *given)
        assert code == 2 and "another tokenizer than the run's" in told


# ── Refusals ──────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    "prompt, options, told",
    [
        ("", (), "the prompt is empty: say how the text begins"),
        ("  ", (), "the prompt '  ' has no character that the tokenizer keeps: add text"),
        ("a\udcff", (), "the prompt 'a\\udcff' is no text (UTF-8): write it again"),
        ("x", ("--temperature", -0.1), "--temperature -0.1: give 0 (greedy) or more"),
        ("x", ("--temperature", "nan"), "--temperature nan: give 0 (greedy) or more"),
        ("x", ("--temperature", "inf"), "--temperature inf: give 0 (greedy) or more"),
        ("x", ("--top-p", 0), "--top-p 0.0: give more than 0, 1 at most"),
        ("x", ("--top-p", 1.1), "--top-p 1.1: give more than 0, 1 at most"),
        ("x", ("--tokens", 0), "--tokens 0: give 1 or more"),
        ("x", ("--seed", -1), "--seed -1: give 0 or more, below 2**63"),
        ("x", ("--tokenizer", "nowhere"), "nowhere: no tokenizer there; give the one that made"),
        ("x", ("--tokenizer", DEMO / "result.json"), "is no SentencePiece model: give another"),
    ],
    ids=str,
)
def test_bad_input_is_one_line(artifact, said, prompt, options, told):
    code, text, line = said(artifact(), prompt, *options)
    assert (code, text, line.count("\n")) == (2, "", 1)
    assert line.startswith("sample.py: error: ") and told in line


def test_a_file_that_is_no_artifact_is_one_line(artifact, said, tmp_path):
    path = artifact()
    raw = path.read_bytes()
    files = {"missing.bin": None, "cut.bin": raw[:-9], "flipped.bin": raw[:-9] + b"x" + raw[-8:]}
    files["text.bin"] = b"no artifact"
    for name, content in files.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        code, text, line = said(tmp_path / name, PROMPT)
        assert (code, text, line.count("\n")) == (2, "", 1) and name in line


def test_a_tokenizer_of_another_size_is_refused(artifact, said):
    code, _, line = said(artifact(vocab_size=385), PROMPT)
    assert code == 2 and "has 384 pieces, the artifact is of VOCAB_SIZE=385; give the" in line


def test_characters_that_the_tokenizer_cannot_spell_are_named():
    class Poor(Letters):
        def piece_to_id(self, piece):
            return 0

        def encode(self, text):
            return [ord(c) if c.isascii() else 0 for c in text]

    with pytest.raises(train_gpt.Refusal, match="cannot spell '日本': leave it out of the prompt"):
        sample.encode_prompt(Codec(Poor()), "a日本 b日")
