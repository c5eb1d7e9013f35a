"""Each part alone costs what the shipped weights cost there, by grids, files and scores of the run.

Would have caught: a part rounded by other grids than the artifact's, a score on validation text, a
baseline that is quantised already, bytes of another compressor, a worth with its sign turned.
"""

import itertools
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY

import ablate
import train_gpt
from ablation import sensitivity
from ablation.sensitivity import BIT_LESS, BIT_MORE, FLOATS, K_LESS, K_MORE, PLANNED, Change
from train_gpt import Config, Refusal, main

TOKENS = 1000
KNOBS = dict(
    quant_clip="sigma",
    quant_scale_floor=False,
    quant_bits_embed=8,
    ema_enabled=True,
    ema_decay=0.5,
    gptq_enabled=True,
    gptq_calibration_batches=1,
    lqer_enabled=True,
    lqer_top_k=2,
    prune_pct=0.1,
    num_layers=2,
    iterations=3,
    eval_stride=0,
    val_max_tokens=200,
)


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory):
    """The folder of a run with an average, SDClip, GPTQ, LQER and pruning."""
    paths = dict(data_path=str(data), tokenizer_path=str(data / "tokenizer.model"))
    logs = tmp_path_factory.mktemp("logs")
    main(Config(**TINY | KNOBS | paths, logs_dir=str(logs), run_id="run"))
    return logs / "run"


@pytest.fixture(scope="module")
def by_layer(folder):
    """What is measured of it by layer, and what of the data was opened."""
    opened = []
    patch = pytest.MonkeyPatch()
    read = train_gpt.read_numbers
    patch.setattr(train_gpt, "read_numbers", lambda p, *a: opened.append(p.name) or read(p, *a))
    found = sensitivity.measure(folder, "layer", (4,), TOKENS)
    patch.undo()
    return found, opened


@pytest.fixture(scope="module")
def model(folder, tmp_path_factory):
    return sensitivity.read_model(folder, TOKENS, str(tmp_path_factory.mktemp("scratch")))


def row_of(found, name):
    (row,) = [row for row in found.rows if row.name == name]
    return row


def test_the_text_is_the_end_of_the_training_text_and_validation_stays_closed(by_layer, data):
    found, opened = by_layer
    last = np.fromfile(data / "fineweb_train_000000.bin", "<u2")[-TOKENS - 1 :]
    assert found.text.tokens.tolist() == last.tolist()
    assert found.floats.targets == TOKENS and {*opened} == {"fineweb_train_000000.bin"}


def test_the_whole_is_the_artifact_and_the_floats_are_the_average(by_layer, model, folder):
    found, _ = by_layer
    _, state = train_gpt.read_artifact(folder / "artifact.bin")
    assert found.artifact == f"the whole is {folder / 'artifact.bin'}, byte for byte"
    score = model.trainer.score_weights
    assert found.whole.score.bpb == score(state).bpb
    assert found.floats.bpb == score(model.weights).bpb != found.whole.score.bpb
    checkpoint = train_gpt.read_container(folder / "checkpoint.bin")[1]
    averaged = {n.removeprefix("ema/"): w for n, w in checkpoint.items() if n.startswith("ema/")}
    pruned = train_gpt.prune(model.trainer.cfg, averaged, 0.1)
    assert all(
        torch.equal(model.weights[name], w.view_as(model.weights[name]))
        for name, w in pruned.items()
    )


def test_each_part_alone_is_as_it_is_in_the_artifact(by_layer, model, folder):
    """The other weights are float; parts are all tensors, each once."""
    found, _ = by_layer
    _, state = train_gpt.read_artifact(folder / "artifact.bin")
    parts = sensitivity.parts_of(model.trainer.plan, "layer")
    assert [*parts] == [row.name for row in found.rows]
    assert [*parts] == ["tok_emb", "blocks.0", "blocks.1", FLOATS]
    assert sorted(itertools.chain(*parts.values())) == sorted(state)
    for name, names in parts.items():
        mixed = model.weights | {n: state[n] for n in names}
        alone = row_of(found, name).found[PLANNED]
        assert alone.score.bpb == model.trainer.score_weights(mixed).bpb
        damage = found.damage(alone)
        assert damage.mbpb == pytest.approx(1e3 * (alone.score.bpb - found.floats.bpb))


def test_variants_are_other_grids_of_the_same_rounding(model):
    rounding = sensitivity.Rounding(model)
    plan = model.trainer.plan
    corrected = [n for n, parts in rounding.whole.items() if "left" in parts]
    assert len(corrected) == 2
    names = ["tok_emb", *corrected]
    found = dict(sensitivity.variants(plan, [*plan], (4,)))
    assert [*found] == [K_LESS, K_MORE, BIT_LESS, "4 bits"]  # the embedding has 8 bits: no more
    found = dict(sensitivity.variants(plan, corrected, (4, 6)))
    assert [*found] == [K_LESS, K_MORE, BIT_MORE, BIT_LESS, "4 bits"]
    grid = plan[corrected[0]]
    assert found[K_LESS][corrected[0]] == grid._replace(sigmas=0.9 * grid.sigmas)
    assert found[K_MORE][corrected[0]] == grid._replace(sigmas=1.1 * grid.sigmas)
    assert [found[v][corrected[0]].bits for v in (BIT_MORE, BIT_LESS, "4 bits")] == [7, 5, 4]

    same = rounding.some({n: plan[n] for n in names})
    for name in names:
        assert same[name].keys() == rounding.whole[name].keys()
        assert torch.equal(same[name]["scale"], rounding.whole[name]["scale"])
    least = rounding.some(found["4 bits"])
    assert all(least[n]["codes"].abs().max() <= 8 and "left" in least[n] for n in corrected)
    sizes = [rounding.bytes(rounding.some(found[v])) for v in ("4 bits", BIT_LESS, BIT_MORE)]
    assert sizes == sorted(sizes) and sizes[0] < rounding.bytes(rounding.planned(corrected))


def test_worth_is_a_difference_of_scores_over_a_share_of_the_bytes(by_layer):
    found, _ = by_layer
    row = row_of(found, "blocks.0")
    gain, cost = found.worth(row)
    for worth, finer, coarser in ((gain, BIT_MORE, PLANNED), (cost, PLANNED, BIT_LESS)):
        a, b = row.found[finer], row.found[coarser]
        percents = 100 * (a.bytes - b.bytes) / found.whole.bytes
        assert worth.mbpb == pytest.approx(1e3 * (b.score.bpb - a.score.bpb) / percents)
        assert worth.margin > 0
    # 8 bits: k in place of one more
    row = row_of(found, "tok_emb")
    assert row.neighbours() == (K_LESS, BIT_LESS) and found.worth(row)[0]
    assert found.worth(row_of(found, FLOATS)) == [None, None]


def test_the_best_places_are_those_that_the_intervals_bear_out():
    def verdicts(**worths) -> list[str]:
        rows = [SimpleNamespace(name=name) for name in worths]
        found = SimpleNamespace(rows=rows, worth=lambda row: worths[row.name])
        return [line.verdict for line in sensitivity.best(found)]

    a = [Change(3, 2.5), Change(2, 0.1)]
    b = [Change(1, 0.2), Change(-0.1, 0.7)]
    c = [None, Change(0.5, 0.05)]
    assert verdicts(a=a, b=b, c=c) == ["b", "a", "c"]
    assert verdicts(a=[Change(1, 2), None], c=c) == ["no part for sure", "c", "c"]
    assert verdicts(a=[None, Change(1, 2)]) == ["no part for sure", "a"]
    assert verdicts(a=[None, None]) == []


def test_the_sum_rule_compares_single_damages_with_the_whole(by_layer):
    found, _ = by_layer
    singles = sum(found.damage(row.found[PLANNED]).mbpb for row in found.rows)
    whole = found.damage(found.whole).mbpb
    off = found.sum_of_parts()
    assert off.mbpb == pytest.approx(singles - whole, abs=1e-9) and off.margin > 0
    told = sensitivity.sum_rule(found)
    assert told.startswith("Sum rule: ") and f"{singles:+.3f} mBPB in sum" in told
    assert ("not distinguishable" in told) == (abs(off.mbpb) <= off.margin)
    assert ("the sum is less" in told) == (off.mbpb < -off.margin)


def test_settings_of_an_export_win_over_those_of_its_checkpoint(folder, tmp_path):
    result = json.loads((folder / "result.json").read_text())
    result["checkpoint"] = str(folder / "checkpoint.bin")
    result["config"]["quant_bits_mlp"] = 4
    (tmp_path / "result.json").write_text(json.dumps(result))
    model = sensitivity.read_model(tmp_path, 100, str(tmp_path))
    assert model.trainer.plan["blocks.0.mlp.fc.weight"].bits == 4


@pytest.mark.parametrize("loader", ["rows", "shuffled", "coprime", "documents"])
def test_what_training_has_read_of_the_text_is_counted(model, loader, monkeypatch):
    """As its loader reads it, whose tokens are their own places here."""
    trainer = model.trainer
    split = trainer.split
    cfg = train_gpt.without_part(trainer.cfg, "loader", loader)
    places = lambda start, n: (start + np.arange(n)) % split.tokens  # noqa: E731
    monkeypatch.setattr(split, "take", places)
    monkeypatch.setattr(trainer, "cfg", cfg)
    monkeypatch.setattr(trainer, "val", trainer.val._replace(n=split.tokens - 5000))
    monkeypatch.setattr(trainer, "lengths", [32] * 3 + [64] * 25)
    read = np.zeros(split.tokens, bool)
    reader = train_gpt.Loader(cfg, trainer.run, split)
    for length in trainer.lengths:
        for side in reader.next(length):
            read[side.flatten().numpy()] = True
    reader.close()
    share = read[5000:].mean()
    ranks = SimpleNamespace(world=1, rank=0, cuda=False)
    assert 0.01 < share < 0.9 and sensitivity.share_read(trainer, ranks) == share


def test_the_command_writes_a_page_and_says_where_bytes_are_worth_most(
    folder, capsys, by_layer, monkeypatch
):
    found, _ = by_layer
    monkeypatch.setattr(sensitivity, "measure", lambda *asked: found)
    assert ablate.main(["sensitivity", str(folder), "--by", "layer", "--bits", "4"]) == 0
    out = capsys.readouterr().out
    page = (folder / "sensitivity.html").read_text()
    for words in (
        "More bytes gain most in",
        "Fewer bytes cost most in",
        "Sum rule: ",
        " s of CPU)",
    ):
        assert words in out and words in page
    assert f"page: {folder}/sensitivity.html" in out and "of which training has read" in out
    assert page.count("<svg") == 2 and "<script" not in page and "default-src 'none'" in page
    assert re.search(r"\| blocks.1 \| 8,192 \| 6 \| 11.5, 13 \|", out)
    assert math.isfinite(found.seconds) and found.cpu_seconds > 0


def test_what_cannot_be_measured_is_one_line(folder, capsys, tmp_path):
    def refused(*words) -> str:
        assert ablate.main(["sensitivity", *map(str, words)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "--by kind: choose tensor or layer" in refused(folder, "--by", "kind")
    assert "--bits 9: give numbers" in refused(folder, "--bits", 9)
    (tmp_path / "result.json").write_text((folder / "result.json").read_text())
    assert "checkpoint.bin: no such file; the weights before quantisation" in refused(tmp_path)
    with pytest.raises(Refusal, match="nothing of this run is quantised"):
        sensitivity.parts_of({"tok_emb": torch.float16}, "tensor")
