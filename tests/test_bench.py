"""bench.py: each twin computes what its fast part computes, FLOPs are those of the model's shapes,
and a report is whole.

No test looks at an absolute time. Would have caught: an optimisation that changes the result, an
MFU of another model's FLOPs, a figure in a table that no file holds, an entropy coder timed without
its coding.
"""

import contextlib
import dataclasses
import io
import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, environment
from launch import ranks_of
from test_optimiser import ALL, make_trainer, normal, on_ranks
from torch import nn

import bench
import train_gpt
from benchmarks import after_training
from benchmarks.after_training import like_trained
from benchmarks.machine import (
    Bench,
    Floor,
    Measured,
    human,
)
from benchmarks.report import BENCH, SCHEMA_VERSION, table
from benchmarks.training import PLAIN, model_rows, step_floors
from benchmarks.twins import (
    plain_average,
    plain_batches,
    plain_muon,
    plain_reduce,
    plain_score,
    plain_view,
)
from planning.flops import forward_flops, muon_flops, muon_matrices
from train_gpt import (
    COMPRESSORS,
    Averages,
    Config,
    FlatParameters,
    Grid,
    Split,
    document_windows,
    windows,
)

REFERENCE = Config()  # seed #194's model and batch
COMMITTED = [
    path for path in sorted(BENCH.glob("*.json")) if "quick" in json.loads(path.read_text())
]
TWINS = {
    "gradient norm and clip",
    "optimiser: Muon",
    "QAT: enter and leave",
    "EMA update",
    "SWA snapshot",
    "SQWA snapshot",
    "wait for data",
    "sliding, stride 64",
    "compress, zstd 22",
}
FLOP_BOUND = (
    "step, whole",
    "forward",
    "backward",
    "fixed windows",
    "sliding, stride 64",
    "document-isolated, stride 64",
)
ROWS = TWINS | {
    "step, whole",
    "forward",
    "backward",
    "optimiser: Muon, rows normalised",
    "optimiser: AdamW",
    *(f"model: {name}" for name in model_rows(3)),
    "checkpoint: copy, on the clock",
    "checkpoint: write, beside the steps",
    "QNA: enter and leave",
    "peak memory",
    "fixed windows",
    "sliding, stride 256",
    "document-isolated, stride 64",
    "quantise",
    "pack (quantise, compress)",
    "load (unpack)",
    "tokenise and write shards, 1 worker",
    "python, import train_gpt",
    "open and check the data",
    "build model and trainer",
    "choose the attention kernel",
    "warm-up and compile",
}


@pytest.fixture
def trainer(tiny):
    """A Trainer whose weights have moved away from their initial zeros and ones."""

    def make(**knobs) -> train_gpt.Trainer:
        made = make_trainer(
            tiny(**{**ALL, "keep_float_max_numel": 0, "quant_bits_embed": 8, **knobs})
        )
        made.flat.weights += 0.2 * normal(*made.flat.weights.shape)
        return made

    return make


@pytest.mark.parametrize("layers", (2, 3, 4, 11, 12))
def test_rows_of_the_models_techniques_fit_every_depth_and_whatever_is_on(layers):
    """Each changes what the model holds, or how it attends."""
    on = {name: value for row in model_rows(11).values() for name, value in row.items()}
    cfg = Config(smear_gate=False, loader="documents", **on)
    plain = dataclasses.replace(cfg, **PLAIN, num_layers=layers)

    def shapes(cfg: Config) -> dict:
        with torch.device("meta"):
            return {name: p.shape for name, p in train_gpt.GPT(cfg).named_parameters()}

    for knobs in model_rows(layers).values():
        changed = dataclasses.replace(plain, **knobs)
        assert shapes(changed) != shapes(plain) or changed.doc_mask > plain.doc_mask


def test_the_looped_blocks_of_11_layers_are_the_records():
    loops = model_rows(11)["two more passes of 3 of 11 blocks"]
    record = Config.from_env({"BASE": "pr1855"})
    assert loops == {name: getattr(record, name) for name in loops}


# ── twins ──
@pytest.mark.parametrize(
    "knobs", [{}, {"muon_coeffs": "polar_express", "muon_row_normalize": True}], ids=str
)
def test_muon_equals_one_matrix_at_a_time(trainer, knobs):
    t = trainer(matrix_lr=0.05, muon_wd=0.1, **knobs)
    live, gradients = (t.flat.views(buffer) for buffer in (t.flat.weights, t.flat.gradients))
    names = list(muon_matrices(t.model))
    plain, momenta = [live[n].clone() for n in names], [torch.zeros_like(live[n]) for n in names]
    before = [live[n].clone() for n in names]
    for step in range(3):
        for i, name in enumerate(names):
            gradients[name].copy_(normal(*live[name].shape, seed=100 * step + i))
        with torch.no_grad():
            t.flat.gather(t.optimiser.muon(train_gpt.StepPlan(1.0, 0.9)))
        plain_muon(plain, [gradients[n] for n in names], momenta, 0.05, 0.9, t.cfg)
    assert len(names) == 6 * 3 + 1
    for name, w, old in zip(names, plain, before, strict=True):
        assert not torch.equal(w, old)
        torch.testing.assert_close(live[name], w, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", ("fixed", "sliding", "documents"))
def test_score_equals_full_logits_one_window_at_a_time(trainer, kind):
    t = trainer()
    rows = {
        "fixed": windows(0, t.val.n, 64, 0),
        "sliding": windows(0, t.val.n, 64, 16),
        "documents": document_windows(t.val, 64, 16),
    }[kind]
    found = train_gpt.score(t.cfg, t.run, t.forward, t.val, rows)
    assert found.bpb == pytest.approx(plain_score(t.model, t.val, rows), abs=1e-6)


@pytest.mark.parametrize(
    "bits, clip, codes, floor",
    [
        (6, "quantile", "sym", True),
        (5, "amax", "asym", False),
        (6, "quantile", "asym", False),
        (4, "search5", "sym", False),
    ],
)
def test_fake_quantisation_equals_the_formula_bit_for_bit(trainer, bits, clip, codes, floor):
    t = trainer(
        qat_enabled=True,
        quant_bits_mlp=bits,
        quant_bits_attn=bits,
        quant_clip=clip,
        quant_codes=codes,
        quant_scale_floor=floor,
    )
    live, latent = dict(t.model.named_parameters()), t.flat.weights.clone()
    kept = t.views.enter(train_gpt.StepPlan(1.0, 0.9, qat=True), 0)
    fast = t.flat.weights.clone()
    t.views.leave(kept)
    grids = t.views.techniques["QAT"].grids
    with plain_view(live, grids):
        assert torch.equal(t.flat.weights, fast) and not torch.equal(fast, latent)
    assert torch.equal(t.flat.weights, latent) and len(grids) > 18


def coarse(weights: torch.Tensor) -> torch.Tensor:
    """The nearest multiples of 1/256: four steps of an EMA by quarters are then exact in fp32."""
    return (weights * 256).round() / 256


@pytest.mark.parametrize("kind", ("ema", "swa", "sqwa", "sqwa of ema"))
def test_averages_equal_those_of_host_copies(trainer, kind):
    """To the last bit: nothing is rounded before the codes, so no value can cross a boundary."""
    on = {f"{name}_enabled": name in kind.split(" of ") for name in ("ema", "swa", "sqwa")}
    t = trainer(**on, ema_decay=0.75)
    t.flat.weights.copy_(coarse(t.flat.weights))
    average = Averages(t.cfg, t.run, t.model, t.flat, t.plan)
    live = dict(t.model.named_parameters())
    ema = {n: p.detach().clone() for n, p in live.items()} if "ema" in kind else {}
    sums = {n: torch.zeros_like(p) for n, p in live.items()} if kind != "ema" else {}

    for step in range(4):
        t.flat.weights += coarse(0.1 * normal(*t.flat.weights.shape, seed=step))
        average.update(kind != "ema")
        plain_average(live, ema, sums, 0.75, t.plan if "sqwa" in kind else None)

    results = average.results()
    means = results.get("sqwa") or results.get("swa")
    for name, weights in live.items():
        if ema:
            assert torch.equal(results["ema"][name], ema[name]), name
            assert not torch.equal(ema[name], weights)
        if sums:
            assert torch.equal(means[name], sums[name] / 4), name


@pytest.mark.parametrize("rank, world", ((0, 1), (0, 2), (1, 2), (2, 3)))
def test_batches_equal_synchronous_reads(tiny, rank, world):
    cfg, run = (
        tiny(),
        SimpleNamespace(rank=rank, world=world, cuda=False, device=torch.device("cpu")),
    )
    split = Split(cfg, "train")
    fast, plain = train_gpt.Loader(cfg, run, split), plain_batches(cfg, run, split)
    for _ in range(5):
        for a, b in zip(fast.next(cfg.train_seq_len), next(plain), strict=True):
            assert torch.equal(a, b) and a.shape[1] == cfg.train_seq_len
    fast.close()


def reductions(rank: int, world: int) -> tuple[torch.Tensor, torch.Tensor, list, list]:
    """(norm, plain norm, gradients, plain gradients) after the mean over the ranks and the clip."""
    params = {
        f"w{i}": train_gpt.parameter(torch.zeros(shape), train_gpt.CONTROL)
        for i, shape in enumerate([(40, 8), (9,), (30, 5)])
    }
    flat = FlatParameters(params, SimpleNamespace(world=world, rank=rank, device="cpu"))
    for i, p in enumerate(params.values()):
        p.grad.copy_(normal(*p.shape, seed=10 * rank + i))
    copies = [nn.Parameter(torch.zeros_like(p)) for p in params.values()]
    for copy, p in zip(copies, params.values(), strict=True):
        copy.grad = p.grad.clone()
    flat.reduce(0.3)
    norm = flat.outcome().norm
    return (
        norm,
        plain_reduce(copies, world, 0.3),
        [p.grad for p in params.values()],
        [copy.grad for copy in copies],
    )


@pytest.mark.parametrize("world", (1, 2))
def test_the_flat_reduction_equals_a_loop_over_parameters(tmp_path, world):
    for norm, plain_norm, gradients, plain in (
        [reductions(0, 1)] if world == 1 else on_ranks(world, tmp_path, reductions)
    ):
        assert norm == pytest.approx(plain_norm.item(), rel=1e-6)
        assert torch.cat([g.flatten() for g in gradients]).norm().item() == pytest.approx(
            0.3, rel=1e-5
        )
        for g, p in zip(gradients, plain, strict=True):
            torch.testing.assert_close(g, p, rtol=0, atol=1e-6)


# ── floors ──
def test_the_flops_are_those_of_the_reference_shapes():
    flops = forward_flops(REFERENCE)
    assert flops.linear / 1e6 == pytest.approx(
        52.95, abs=0.005
    ) and flops.attention / 1e6 == pytest.approx(23.08, abs=0.005)
    assert flops.trained / 1e6 == pytest.approx(228.1, abs=0.05) and flops.head == 2 * 1024 * 512
    assert flops.trained * REFERENCE.train_batch_tokens / 1e12 == pytest.approx(119.6, abs=0.05)
    # blocks 3 to 5 twice more: 17 visits
    looped = forward_flops(dataclasses.replace(REFERENCE, num_loops=2))
    assert looped.attention == flops.attention * 17 / 11 and looped.head == flops.head
    assert looped.linear - flops.head == pytest.approx((flops.linear - flops.head) * 17 / 11)


def test_the_matrices_and_their_newton_schulz_flops_are_those_of_the_reference():
    with torch.device("meta"):
        model = train_gpt.GPT(REFERENCE)
    shapes = muon_matrices(model).values()
    assert len(shapes) == 66 and sum(map(math.prod, shapes)) == 25_952_256
    assert muon_flops(shapes, 5) / 1e9 == pytest.approx(314, abs=1)
    techniques = dict(bigram_vocab_size=4096, ve_enabled=True)
    more = (
        forward_flops(dataclasses.replace(REFERENCE, **techniques)).linear
        - forward_flops(REFERENCE).linear
    )
    assert more == 2 * (128 * 512 + 128 * 256)  # their projections; tables cost none


def test_the_floor_of_a_step_adds_up_to_that_of_the_reference():
    run = SimpleNamespace(
        world=1,
        cuda=True,
        dtype=torch.bfloat16,
        device=torch.device("cuda"),
        broadcast=lambda value: value,
    )
    b = Bench(REFERENCE, run, quick=False)
    b.flop_rate, b.bandwidth = 790e12, lambda size, host: 4.3e12  # of one H200, measured
    with torch.device("meta"):
        model = train_gpt.GPT(REFERENCE)
    forward, backward, step = step_floors(b, model, REFERENCE.train_batch_tokens)
    assert (
        step.seconds == pytest.approx(0.230, rel=0.05)
        and 1.8 < backward.seconds / forward.seconds < 2
    )
    eight = SimpleNamespace(**{**vars(run), "world": 8})
    b.run = eight
    assert step_floors(b, model, REFERENCE.train_batch_tokens // 8)[2].seconds == pytest.approx(
        step.seconds / 8, rel=1e-3
    )


def test_work_is_timed_in_turns_and_each_rate_follows_from_its_row(run):
    b, order = Bench(REFERENCE, run, quick=True), []
    seconds = b.time(lambda: order.append("a"), lambda: order.append("b"), block=False)
    assert order == ["a", "b"] * 5 and seconds.shape == (2, 3) and (seconds > 0).all()
    b.time(lambda: order.append("c"), warm=False)
    assert 1 <= order.count("c") <= 3
    samples = torch.tensor([[0.2, 0.1, 0.3], [0.5, 0.4, 0.9]]).double().numpy()
    b.add(Measured("g", "n", samples, Floor(0.05, "how"), (100, "tokens/s"), "twin", "note"))
    row = b.rows[-1]
    assert (row["ms"], row["twin_ms"], row["rate"], row["ratio"], row["n"]) == (200, 500, 500, 4, 3)
    assert row["speedup"] == 3 and row["spread"] == pytest.approx(0.8) and row["floor_ms"] == 50


def test_the_compilation_of_all_ways_to_score_is_a_row_of_the_start_up(monkeypatch):
    run = SimpleNamespace(world=1, cuda=False, compile=True)
    b = Bench(REFERENCE, run, quick=True)
    monkeypatch.setattr(after_training, "score_mode", lambda b, trainer, mode: 0.5)
    after_training.scoring(b, None)
    (row,) = b.rows
    assert (row["group"], row["name"]) == ("start-up", "compile for scoring")
    assert row["ms"] == 500 * len(after_training.MODES) and row["spread"] is None


def test_numbers_are_spelt_for_people():
    assert [human(v, "B") for v in (999, 1234567, 5e15, 0)] == [
        "999 B",
        "1.23 MB",
        "5 PB",
        "0 B",
    ]
    assert human(12345.6, "tokens/s") == "12,300 tokens/s"


def test_weights_of_the_export_are_spread_by_row_and_column_as_trained_ones_are():
    w = like_trained((600, 400), torch.Generator().manual_seed(0))
    for dim in (0, 1):
        assert 0.4 < w.square().mean(dim).sqrt().log().std() < 0.6
    codes, _ = Grid(6, "quantile", "sym", True).quantise(w)
    share = (codes.int() + 31).flatten().bincount().double() / codes.numel()
    assert (
        3.5 < torch.special.entr(share).sum() / math.log(2) < 5
    )  # bits, in the range of real artifacts
    assert like_trained((), torch.Generator()).shape == () and like_trained(
        (7,), torch.Generator()
    ).shape == (7,)


# ── the command ──
@pytest.fixture(scope="module")
def quick(data, tmp_path_factory) -> SimpleNamespace:
    """One quick run in this process: what it returned, wrote and printed."""
    folder = tmp_path_factory.mktemp("bench")
    cfg = Config(
        **{
            **TINY,
            "data_path": str(data),
            "tokenizer_path": str(data / "tokenizer.model"),
            "logs_dir": str(folder / "logs"),
            "run_id": "mine",
            "qat_enabled": True,
            "ema_enabled": True,
        }
    )
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        for name, value in environment(cfg).items():
            patch.setenv(name, value)
        code = bench.main(["run", "--quick", "--name", "mine", "--out", str(folder / "out")])
    return SimpleNamespace(
        code=code, folder=folder, path=folder / "out" / "mine.json", out=out.getvalue(), cfg=cfg
    )


def check(report: dict, needed: set[str]) -> None:
    """What holds for every report, whatever machine it is from."""
    assert report["schema"] == SCHEMA_VERSION and "bench.py run" in report["command"]
    assert {
        "device",
        "torch",
        "threads_per_rank",
        "world_size",
        "dtype",
        "compile",
        "settings",
        "date",
    } <= report.keys()
    assert (
        all(len(digest) == 64 for digest in report["code_sha256"].values())
        and len(report["code_sha256"]) == 2
    )
    names = [row["name"] for row in report["rows"]]
    assert needed <= set(names) and len(set(names)) == len(names)
    for row in report["rows"]:
        numbers = [v for v in row.values() if isinstance(v, (int, float))]
        assert (
            all(math.isfinite(v) and v >= 0 for v in numbers)
            and row["n"] >= 1
            and (row["spread"] is None) == (row["n"] == 1)
        )
        assert row["name"] == "peak memory" or row["ms"] > 0
        assert ("floor" in row) == ("ratio" in row) == ("floor_ms" in row)
        assert ("twin" in row) == ("speedup" in row) == ("twin_ms" in row)
    assert {
        row["name"].replace(" exchange,", "") for row in report["rows"] if "twin" in row
    } >= TWINS


def test_a_quick_run_writes_a_whole_report_and_prints_its_table(quick):
    report = json.loads(quick.path.read_text())
    assert quick.code == 0 and report["quick"] and report["name"] == "mine"
    check(
        report,
        ROWS
        | {
            f"compress, {name} {entry.level}"
            for name, entry in COMPRESSORS.items()
            if name != "none"
        },
    )
    assert table(report) in quick.out and quick.out.rstrip().endswith(f"wrote {quick.path}")
    assert (
        report["command"].endswith("python bench.py run --name mine --quick")
        and "MODEL_DIM=32 " in report["command"]
    )
    assert (
        report["settings"]["QAT_ENABLED"] == "1" and report["config_sha256"] == quick.cfg.digest()
    )
    assert report["code_sha256"]["train_gpt.py"] == train_gpt.CODE_SHA256
    assert report["model"]["params"] == sum(
        p.numel() for p in train_gpt.GPT(quick.cfg).parameters()
    )


def test_the_rates_of_a_report_agree_with_its_settings(quick):
    report = json.loads(quick.path.read_text())
    rows = {row["name"]: row for row in report["rows"]}
    step, flops = rows["step, whole"], forward_flops(quick.cfg)
    assert step["rate"] == pytest.approx(512 / step["ms"] * 1e3, rel=1e-4) and step["share"] == 1
    ceiling = max(row["rate"] for row in report["rows"] if row["name"].startswith("matmul"))
    assert (
        0 < step["mfu"] <= flops.trained * 512 / (step["ms"] / 1e3) / ceiling * 1.01
    )  # the ceiling is the fastest sample


def test_every_compressor_says_its_bytes_and_ans_is_coded(quick):
    rows = {
        row["name"]: row["note"]
        for row in json.loads(quick.path.read_text())["rows"]
        if row["group"] == "export"
    }
    notes = {
        name: rows[f"compress, {name} {entry.level}"]
        for name, entry in COMPRESSORS.items()
        if name != "none"
    }
    sizes = {
        name: [int(n.replace(",", "")) for n in re.findall(r"\d[\d,]*(?= )", note)]
        for name, note in notes.items()
    }
    assert (
        len({raw for raw, *_ in sizes.values()}) == 1 and len(sizes["zstd"]) == 3
    )  # the twin's bytes, too
    assert all(0 < packed < raw for raw, packed, *_ in sizes.values())
    assert sizes["ans"][1] != sizes["brotli"][1]
    for name in notes:
        assert rows[f"decompress, {name}"].startswith(f"{sizes[name][1]:,} -> {sizes[name][0]:,} ")


def test_a_run_leaves_nothing_but_its_report(quick):
    assert [path.name for path in quick.folder.rglob("*") if path.is_file()] == ["mine.json"]


def test_no_fast_part_is_three_times_slower_than_its_twin(quick):
    """In turns, the best of three pairs: a busy neighbour does not fail it.

    (Threads take longer to wake than so few rows, and a technique of the model is no fast part.)
    """
    report = json.loads(quick.path.read_text())
    slow = {
        row["name"]: row["speedup_p90"]
        for row in report["rows"]
        if "speedup" in row and row["speedup_p90"] < 1 / 3
    }
    assert all(name == "wait for data" or name.startswith("model: ") for name in slow), slow


def test_two_ranks_make_one_report(quick, tmp_path):
    codes, said = ranks_of(
        2, environment(quick.cfg), "bench.py", "run", "--quick", "--out", tmp_path
    )
    assert codes == [0, 0], said
    [path] = tmp_path.iterdir()
    report, names = (
        json.loads(path.read_text()),
        {row["name"] for row in json.loads(quick.path.read_text())["rows"]},
    )
    check(
        report,
        {"gradient exchange, norm and clip"}
        | {n for n in names if n in ROWS} - {"gradient norm and clip"},
    )
    assert (
        report["world_size"] == 2
        and "torchrun --standalone --nproc_per_node=2 bench.py run" in said
    )
    assert said.count("wrote ") == 1 and path.stem.endswith("-x-2")


def test_an_existing_report_is_kept(quick, monkeypatch, capsys):
    before = quick.path.read_bytes()
    monkeypatch.setattr(bench, "measure", lambda *a: pytest.fail("measured all the same"))
    for name, value in environment(quick.cfg).items():
        monkeypatch.setenv(name, value)
    assert bench.main(["run", "--name", "mine", "--out", str(quick.path.parent)]) == 2
    message = capsys.readouterr().err
    assert (
        message.count("\n") == 1
        and "mine.json: exists; --force" in message
        and quick.path.read_bytes() == before
    )


@pytest.mark.parametrize(
    "name, value, said",
    (("MODEL_DIM", "33", "MODEL_DIM=33"), ("CHECKPOINT", "a.bin", "CHECKPOINT")),
)
def test_bad_settings_end_with_one_line(monkeypatch, capsys, tmp_path, name, value, said):
    monkeypatch.setenv(name, value)
    assert bench.main(["run", "--out", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("bench.py: error: ") and said in message and message.count("\n") == 1


def test_an_argument_that_is_no_setting_is_refused(capsys, tmp_path):
    assert bench.main(["run", "TYPO=1", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("bench.py: error: TYPO=1: no such setting")


def test_show_prints_both_tables_of_a_report(quick, capsys):
    report = json.loads(quick.path.read_text())
    assert bench.main(["show", str(quick.path)]) == 0
    assert capsys.readouterr().out == table(report) + "\n"
    assert bench.main(["show", str(quick.path), "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert report["command"] in lines[-1] and {line.count("|") for line in rows} == {
        rows[0].count("|")
    }
    assert len(rows) == 2 + len(report["rows"]) and report["device"] in lines[0]


# ── the committed reports ──
@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_a_committed_report_is_whole_and_sane(path):
    report = json.loads(path.read_text())
    check(report, set(FLOP_BOUND))
    rows = {row["name"].replace(" exchange,", ""): row for row in report["rows"]}
    assert not report["quick"] and report["name"] == path.stem and path.stat().st_size < 100_000
    assert 0.005 < rows["step, whole"]["mfu"] < 1.1
    for name in FLOP_BOUND:
        assert 0.9 < rows[name]["ratio"] < 50, name
    for name in TWINS - {"wait for data"}:
        assert rows[name]["speedup"] > 0.5, name
    assert rows["step, whole"]["ms"] > 0.7 * (rows["forward"]["ms"] + rows["backward"]["ms"])
    assert table(report, markdown=True).count("\n|") > 20
