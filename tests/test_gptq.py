"""GPTQ, the sigma grid and the codes of head gates: tests/golden/gptq.json (#1855, as a black box),
and our own formulas where the file has no case.

Would have caught: a division by 0 in a row of zeros or of one number (the records'), a clip whose
error is forgotten, columns in the order of the undamped diagonal, Hessians without the loops
(84 mBPB in #1512) or of one rank alone, pruned weights that come back, a calibration after the end
of the budget, QAT on another grid than the artifact's.
"""

import base64
import json
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from roles import draw32, golden_model
from test_frontier_model import RECORDS, config_of
from test_score import two_ranks

import train_gpt
from train_gpt import (
    GPT,
    Config,
    Grid,
    Run,
    Split,
    Trainer,
    Validation,
    build_model,
    collect_hessians,
    export_plan,
    gptq,
    inverse_factor,
    main,
    quantised,
    read_container,
    refitted,
    restored,
    sdpa,
    weighted_error,
)

GOLDEN = json.loads((Path(__file__).parent / "golden" / "gptq.json").read_text())


def golden_case(case: dict, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(1, rows, columns) and (1, columns, columns): columns of mixed inputs, two nearly the same,
    one that is always 0; the file's README has the recipe."""
    name, (rows, columns) = case["name"], case["shape"]
    x = draw32(f"gptq.{name}.activation", (case["samples"], columns)).astype(np.float64)
    x = x @ (np.eye(columns) + draw32(f"gptq.{name}.mix", (columns, columns), 0.5 / columns**0.5))
    x = x * np.exp(draw32(f"gptq.{name}.column_scale", (columns,), 0.7))
    one, other = case["twin_columns"]
    noise = draw32(f"gptq.{name}.twin_noise", (case["samples"],))
    x[:, other] = 0.95 * x[:, one] + 0.1 * noise
    x[:, case["dead_column"]] = 0.0
    x = x.astype(np.float32).astype(np.float64)
    w = draw32(f"gptq.{name}.weight", (rows, columns), 0.05)
    h = (x.T @ x / 4.0).astype(np.float32)
    return torch.tensor(w).to(dtype)[None], torch.tensor(h).to(dtype)[None]


def error_of(grid_parts, w: torch.Tensor, h: torch.Tensor) -> float:
    codes, scale = grid_parts
    return weighted_error(w - Grid.dequantise(codes, scale), h).item()


by_case = pytest.mark.parametrize(
    "case", GOLDEN["cases"], ids=lambda case: f"{case['name']}-{case['clip_sigmas']}"
)


@by_case
@pytest.mark.parametrize("block", [128, 7])
def test_codes_and_steps_are_those_of_the_record(case, block, monkeypatch):
    monkeypatch.setattr(train_gpt, "GPTQ_BLOCK", block)
    w, h = golden_case(case, torch.float64)
    grid = Grid(case["bits"], "sigma", sigmas=case["clip_sigmas"])
    codes, scale = gptq(grid, w, h, case["damping"])
    theirs = np.frombuffer(base64.b64decode(case["codes_fp64"]), np.int8)
    assert np.array_equal(codes[0].numpy().ravel(), theirs)
    assert scale[0, :, 0].view(torch.int16).tolist() == case["scales_fp16_bits"]
    assert inverse_factor(h, case["damping"])[1][0].tolist() == case["column_order"]
    assert error_of((codes, scale), w, h) == pytest.approx(case["weighted_error_gptq"], rel=1e-3)
    nearest = error_of(grid.quantise(w), w, h)
    assert nearest == pytest.approx(case["weighted_error_round_to_nearest"], rel=1e-3)
    # a sweep in float32, as in a run, may end elsewhere in a row; its error may not
    single = gptq(grid, w.float(), h.float(), case["damping"])
    assert error_of(single, w, h) == pytest.approx(case["weighted_error_gptq"], rel=1e-3)
    better = refitted(w, codes, scale, h)
    assert error_of((codes, better), w, h) < 0.99 * case["weighted_error_gptq"]


def test_gates_are_the_codes_of_the_record():
    for case in GOLDEN["gate"]:
        w = torch.tensor(draw32(case["role"], case["shape"], case["std"]))
        codes, scale = train_gpt.GATE_GRID.quantise(w)
        assert codes.tolist() == case["codes"]
        assert scale[:, 0].view(torch.int16).tolist() == case["scales_fp16_bits"]


# ── The formula ───────────────────────────────────────────────────────────────────────────────────
def inputs(columns: int, seed: int, samples: int = 300) -> torch.Tensor:
    """(1, columns, columns): the Hessian of inputs that go together."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(samples, columns, generator=generator, dtype=torch.float64)
    x = x @ (torch.eye(columns) + mix / columns**0.5)
    return (x.T @ x / samples)[None]


def one_by_one(grid: Grid, w: torch.Tensor, h: torch.Tensor, damp: float) -> torch.Tensor:
    """The codes by the plain rule: invert what is left of H anew behind each column."""
    scale = grid.scale(w)
    diagonal = h.diagonal() + (h.diagonal() == 0)
    h = h - torch.diag(h.diagonal()) + torch.diag(diagonal + damp * diagonal.mean())
    order = h.diagonal().argsort(descending=True, stable=True).tolist()
    left = w.clone()
    codes = torch.zeros_like(w)
    for place, j in enumerate(order):
        inverse = torch.linalg.inv(h[order[place:]][:, order[place:]])
        codes[:, j] = grid.levels(left[:, j : j + 1], scale)[:, 0] * (left[:, j] != 0)
        error = (left[:, j] - codes[:, j] * scale[:, 0]) / inverse[0, 0]
        left[:, order[place:]] -= error[:, None] * inverse[0]
    return codes


@settings(max_examples=12)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 24),
    bits=st.integers(2, 8),
    clip=st.sampled_from(["amax", "sigma", "search5"]),
    block=st.integers(1, 30),
    seed=st.integers(0, 99),
)
def test_any_shape_gives_the_codes_of_the_plain_rule(rows, columns, bits, clip, block, seed):
    w = torch.randn(2, rows, columns, generator=torch.Generator().manual_seed(seed)).double()
    h = torch.cat((inputs(columns, seed), inputs(columns, seed + 1)))
    if columns > 2:
        h[:, 1] = h[:, :, 1] = 0.0
        w[:, :, 1] = 0.0
    grid = Grid(bits, clip, "sym", sigmas=2.5 if clip == "sigma" else 0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt, "GPTQ_BLOCK", block)
        codes, scale = gptq(grid, w, h, 0.01)
    assert torch.equal(scale, grid.quantise(w)[1])
    plain = torch.stack([one_by_one(grid, *pair, 0.01) for pair in zip(w, h, strict=True)])
    assert torch.equal(codes.double(), plain)


@pytest.mark.parametrize("rows, columns", [(1, 1), (1, 40), (40, 1), (3, 2)])
def test_rows_of_zeros_and_of_one_number_and_dead_inputs_end_as_numbers(rows, columns):
    for value in (0.0, 0.7, -3.0):
        w = torch.full((1, rows, columns), value)
        for h in (inputs(columns, 3).float(), torch.zeros(1, columns, columns)):
            grid = Grid(6, "sigma", sigmas=12.85)
            codes, scale = gptq(grid, w, h, 0.01)
            assert (scale > 0).all() and scale.isfinite().all()
            assert torch.equal(refitted(w, codes, scale, h).isfinite(), scale.isfinite())
            if h.any():
                shipped = Grid.dequantise(codes, scale)
                assert torch.allclose(shipped, w, atol=0.02 * abs(value))
            else:
                assert not codes.any()


def test_what_is_pruned_stays_0_and_its_error_goes_on():
    w = torch.randn(1, 12, 60, generator=torch.Generator().manual_seed(0)).double()
    pruned = torch.where(w.abs() < 0.3, 0.0, w)
    h = inputs(60, 5)
    grid = Grid(4, "sigma", sigmas=3.0)
    codes, scale = gptq(grid, pruned, h, 0.01)
    assert not codes[pruned == 0].any() and codes[pruned != 0].any()
    assert error_of((codes, scale), pruned, h) < error_of(grid.quantise(pruned), pruned, h)


def test_the_refit_is_least_squares_on_the_outputs():
    x = torch.randn(200, 30, generator=torch.Generator().manual_seed(0)).double()
    h = (x.T @ x / 200)[None]
    w = torch.randn(1, 5, 30, generator=torch.Generator().manual_seed(1)).double()
    codes, scale = Grid(3, "amax").quantise(w)
    codes[0, 4] = 0
    found = refitted(w, codes, scale, h)
    for row in range(4):
        q = codes[0, row].double()
        step = np.linalg.lstsq((x @ q)[:, None].numpy(), (x @ w[0, row]).numpy(), rcond=None)[0]
        assert found[0, row].item() == pytest.approx(step.item(), rel=1e-3)
    assert found[0, 4] == scale[0, 4]


def hessian_matrices() -> tuple[dict, dict, dict]:
    """(state, plan, Hessians) of two matrices of one shape."""
    normal = torch.Generator().manual_seed(0)
    state = {name: torch.randn(16, 20, generator=normal) for name in "ab"}
    hessians = {"a": inputs(20, 0)[0].float(), "b": inputs(20, 1)[0].float()}
    return state, dict.fromkeys(state, Grid(4, "sigma", sigmas=4.0)), hessians


@pytest.mark.parametrize("knob", ["gptq_damp", "gptq_refit", "lqer_factor_bits"])
def test_each_knob_of_the_export_reaches_it(knob):
    state, plan, hessians = hessian_matrices()
    cfg = Config(gptq_enabled=True, lqer_enabled=True, lqer_rank=2, lqer_asym_enabled=False)
    changed = dict(gptq_damp=1.0, gptq_refit=True, lqer_factor_bits=6)[knob]
    made = []
    for setting in (cfg, train_gpt.dataclasses.replace(cfg, **{knob: changed})):
        parts = quantised(setting, state, plan, hessians)
        made.append({(name, part): t for name in parts for part, t in parts[name].items()})
    assert made[0].keys() == made[1].keys()
    assert not all(torch.equal(t, made[1][key]) for key, t in made[0].items())


@pytest.mark.parametrize("gptq_enabled", [True, False], ids=["GPTQ", "LQER"])
def test_a_hessian_that_needs_more_damping_is_refused_by_name(tiny, gptq_enabled):
    state, plan, hessians = hessian_matrices()
    # as the fp32 sums of a few rows may be
    hessians["b"][0, 1] = hessians["b"][1, 0] = 2 * hessians["b"].diagonal().max()
    lqer = dict(lqer_enabled=True, lqer_fit="refit", lqer_rank=2)
    cfg = tiny(gptq_enabled=gptq_enabled, gptq_damp=1e-3, **lqer)
    problem = r"GPTQ_DAMP=0.001: the Hessian of b .* raise GPTQ_DAMP, .* CHECKPOINT=PATH"
    with pytest.raises(train_gpt.Refusal, match=problem):
        train_gpt.export(cfg, Run(cfg), state, plan, hessians)
    enough = train_gpt.dataclasses.replace(cfg, gptq_damp=9.0)
    assert quantised(enough, state, plan, hessians).keys() == state.keys()


# ── The sigma grid ────────────────────────────────────────────────────────────────────────────────
def test_a_sigma_step_is_so_many_deviations_of_its_row():
    w = 0.05 * torch.randn(4, 50, generator=torch.Generator().manual_seed(0)) + 0.001
    scale = Grid(6, "sigma", sigmas=12.85).scale(w)
    wanted = 12.85 * w.double().numpy().std(1, ddof=1) / 31
    assert np.array_equal(scale[:, 0].numpy(), wanted.astype("f2").astype("f4"))
    # quiet rows too: fp16 has steps down to 2^-24
    for size in (1e-4, 1e-6, 1e-12):
        quiet = Grid(6, "sigma", sigmas=12.85).scale(size * w)[:, 0].numpy()
        expected = np.maximum(size * wanted, 2.0**-24).astype("f2").astype("f4")
        np.testing.assert_allclose(quiet, expected, rtol=0, atol=2.0**-24 * (size < 1e-5))
    # all codes that far out are cut
    w[0, 0] = 9.0
    codes = Grid(6, "sigma", sigmas=2.0).quantise(w)[0]
    assert codes[0, 0] == 31


def state_of(model: GPT) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


SIGMA = dict(quant_clip="sigma", quant_scale_floor=False, quant_bits_embed=7)


def tiny_plan(**knobs) -> dict:
    cfg = Config(**{**TINY, **SIGMA, **knobs})
    return export_plan(cfg, GPT(cfg))


def test_each_role_has_its_own_deviations_and_looped_blocks_theirs():
    tables = dict(bigram_vocab_size=64, ve_enabled=True, ve_layers="1", keep_float_max_numel=0)
    plan = tiny_plan(**tables, mlp_clip_sigmas=1, attn_clip_sigmas=2, embed_clip_sigmas=3)
    found = {name: how.sigmas for name, how in plan.items() if isinstance(how, Grid)}
    kinds = {"mlp": 1, "attn": 2, "tok_emb": 3, "value_embed.embed": 3, "proj": 12.85}
    for name, sigmas in found.items():
        fitting = [n for kind, n in kinds.items() if kind in name.replace("attn.proj", "attn")]
        assert sigmas in fitting or (name == "bigram.embed" and sigmas == 12.85), name
    looped = dict(num_loops=1, loop_start=1, loop_end=1, loop_layer_bits=5)
    plan = tiny_plan(**looped, loop_layer_clip_sigmas=9, keep_float_max_numel=0)
    grids = {name: (plan[name].bits, plan[name].sigmas) for name in found if "blocks" in name}
    assert {how for name, how in grids.items() if ".1." in name} == {(5, 9)}
    assert {how for name, how in grids.items() if ".1." not in name} == {(6, 11.5), (6, 13)}


def test_gates_ship_as_codes_only_where_that_is_asked_for():
    gated = dict(sparse_attn_gate_enabled=True)
    names = [f"blocks.{i}.attn.gate.weight" for i in range(3)]
    assert {tiny_plan(**gated)[name] for name in names} == {torch.float16}
    plan = tiny_plan(**gated, gated_attn_quant_gate=True)
    assert {plan[name] for name in names} == {Grid(8, "amax")}


@pytest.mark.parametrize("scope", ["exported", "linears"])
def test_qat_and_qna_see_the_sigma_grid_that_ships(tiny, scope):
    cfg = tiny(
        **SIGMA,
        qat_enabled=True,
        qat_scope=scope,
        qat_start_kind="iter_frac",
        qat_start=0.5,
        qna_enabled=True,
        qna_scope=scope,
        sparse_attn_gate_enabled=True,
    )
    trainer = trainer_of(cfg)
    latent = {name: p.clone() for name, p in state_of(trainer.model).items()}
    shipped = {
        name: restored(parts)
        for name, parts in quantised(cfg, latent, trainer.plan).items()
        if "codes" in parts
    }
    assert "tok_emb" in shipped and len(shipped) == 13
    views = trainer.views
    saved = views.enter(views.techniques["QAT"].at_full_strength(), 0)
    seen = {name: p.clone() for name, p in state_of(trainer.model).items()}
    views.leave(saved)
    for name in shipped.keys() - ({"tok_emb"} if scope == "linears" else set()):
        assert torch.equal(seen[name], shipped[name]), name
        assert trainer.plan[name].clip == "sigma"
    saved = views.enter(views.techniques["QNA"].at_full_strength(), 0)
    name = "blocks.0.mlp.fc.weight"
    noise = trainer.model.get_parameter(name) - latent[name]
    views.leave(saved)
    assert (noise.abs() <= 0.5001 * trainer.plan[name].scale(latent[name])).all()
    assert (noise.abs().amax(1) > 0.3 * trainer.plan[name].scale(latent[name])[:, 0]).all()


# ── Hessians ──────────────────────────────────────────────────────────────────────────────────────
MATRICES = {
    "attention.input": "attn.c_q",
    "attention.output_input": "attn.proj",
    "mlp.input": "mlp.fc",
    "mlp.hidden": "mlp.proj",
}


@pytest.mark.parametrize("loops", ["loops_on", "loops_off"])
def test_hessians_are_those_of_the_record(exact, loops):
    golden = GOLDEN["hessian"]
    model = golden_model(config_of(RECORDS["full.record"]["settings"] | {"doc_mask": None}))
    if loops == "loops_off":
        model.loops = 0
    ids = [torch.tensor(batch) for batch in golden["tokens"]]
    found = collect_hessians(model, ids, state_of(model))
    assert len(found) == 11 * 6 + 1
    for role, expected in golden[loops].items():
        block, _, rest = role.partition(".")
        name = "tok_emb"
        if rest in MATRICES:
            name = f"blocks.{block.removeprefix('block')}.{MATRICES[rest]}.weight"
        h = found[name] / golden["batches"]
        close = dict(rel=1e-9, abs=1e-9 * expected["trace"])
        assert h.trace().item() == pytest.approx(expected["trace"], **close)
        assert h.sum().item() == pytest.approx(expected["sum"], **close)
        assert h.norm().item() == pytest.approx(expected["frobenius"], **close)
        for place, value in expected["entries"].items():
            row, column = map(int, place.split(","))
            assert h[row, column].item() == pytest.approx(value, **close)
    assert torch.equal(found["blocks.0.attn.c_q.weight"], found["blocks.0.attn.c_v.weight"])
    # nothing stays behind in the model
    assert not any(module._forward_pre_hooks for module in model.modules())


def trainer_of(cfg: Config, place: tuple[int, int] | None = None) -> Trainer:
    """place: (ranks, this one's number), where no launcher says so."""
    run = Run(cfg)
    model = build_model(cfg, run, sdpa)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    val = Validation(cfg, run, Split(cfg, "val"))
    trainer = Trainer(cfg, run, model, export_plan(cfg, model), Split(cfg, "train"), val)
    if place:
        run.world, run.rank = place
    return trainer


def test_hessians_are_of_the_rows_to_come_with_the_masks_of_training_and_of_all_ranks(
    tiny, monkeypatch
):
    """Each rank's sum of its own rows; the message that adds them up is left out here."""
    knobs = dict(**SIGMA, doc_mask=True, loader="documents", train_batch_tokens=256)
    trainer = trainer_of(tiny(**knobs))
    trainer.lengths = [256, 256]
    alone = trainer.hessians(2)
    loader = train_gpt.Loader(trainer.cfg, trainer.run, trainer.split, trainer.lengths)
    ids = [loader.next(64)[0] for _ in range(2)]
    trainer.model.longest_piece = 64
    again = collect_hessians(trainer.model, ids, alone)
    for name, h in alone.items():
        torch.testing.assert_close(h, again[name] / 512)
    # the masks and the place in the text matter
    trainer.model.longest_piece = 4
    assert not torch.allclose(
        collect_hessians(trainer.model, ids, ["tok_emb"])["tok_emb"] / 512, alone["tok_emb"]
    )
    trainer.lengths = []
    assert not torch.allclose(trainer.hessians(2)["tok_emb"], alone["tok_emb"])

    messages = []
    monkeypatch.setattr(train_gpt.dist, "all_reduce", messages.append)
    shares = []
    for rank in range(2):
        trainer = trainer_of(tiny(**SIGMA), (2, rank))
        shares.append(trainer.hessians(1))
    both = trainer_of(tiny(**SIGMA)).hessians(1)
    assert len(messages) == 2 * (1 + len(both))
    for name, h in both.items():
        torch.testing.assert_close(shares[0][name] + shares[1][name], h)


def test_a_rank_without_rows_and_inputs_that_are_not_finite_are_refused(tiny, monkeypatch):
    trainer = trainer_of(tiny(**SIGMA))
    gone = train_gpt.Refusal("no rows")
    with monkeypatch.context() as patch:
        patch.setattr(train_gpt.Loader, "next", lambda self, length: gone)
        with pytest.raises(train_gpt.Refusal, match="no rows"):
            trainer.hessians(1)
    with torch.no_grad():
        trainer.model.blocks[1].mlp.fc.weight.fill_(float("nan"))
    with pytest.raises(train_gpt.Refusal, match="are not finite") as refusal:
        trainer.hessians(1)
    assert refusal.value.code == 5


# ── A run ─────────────────────────────────────────────────────────────────────────────────────────
GPTQ = dict(**SIGMA, gptq_enabled=True, gptq_calibration_batches=2, keep_float_max_numel=64)


def artifact(report: dict) -> dict[str, torch.Tensor]:
    return read_container(Path(report["artifact_path"]))[1]


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """(its settings, its result) of a run with GPTQ, loops, tables and pruning, within a budget."""
    folder = tmp_path_factory.mktemp("gptq")
    paths = dict(data_path=str(data), tokenizer_path=str(data / "tokenizer.model"))
    model = dict(num_loops=1, loop_start=1, loop_end=1, enable_looping_at=0.0)
    tables = dict(bigram_vocab_size=64, bigram_dim=16)
    budget = dict(iterations=3, max_wallclock_seconds=1e3, logs_dir=str(folder), run_id="gptq")
    cfg = Config(**{**TINY, **paths, **GPTQ, **model, **tables, **budget}, prune_pct=0.2)
    return cfg, main(cfg)


def test_a_run_ships_codes_that_its_training_rows_have_moved(finished, tmp_path):
    cfg, report = finished
    trainer = trainer_of(train_gpt.dataclasses.replace(cfg, logs_dir=str(tmp_path)))
    facts, tensors = read_container(Path(cfg.logs_dir) / "gptq" / "checkpoint.bin")
    trainer.restore(facts, tensors)
    weights = train_gpt.prune(cfg, state_of(trainer.model), 0.2)
    hessians = trainer.hessians(2)
    parts = quantised(cfg, weights, trainer.plan, hessians)
    shipped = artifact(report)
    nearest = quantised(cfg, weights, trainer.plan)
    moved = []
    for name, tensor in parts.items():
        for part, t in tensor.items():
            assert torch.equal(shipped[train_gpt.part_name(name, part)], t), (name, part)
        if "codes" in tensor:
            assert torch.equal(tensor["scale"], nearest[name]["scale"]), name
            assert not tensor["codes"][weights[name] == 0].any()
            moved += [name] * (not torch.equal(tensor["codes"], nearest[name]["codes"]))
    # tables are looked up: no inputs
    assert set(moved) == hessians.keys() and "bigram.embed" in trainer.plan.keys() - hessians.keys()
    assert isinstance(trainer.plan["bigram.embed"], Grid) and "bigram.proj.weight" in moved


def test_a_run_tells_what_gptq_did_and_what_it_took(finished):
    _, report = finished
    row = report["toggles"]["GPTQ"]
    assert row["active"] and row["tensors"] == 20 and row["params"] > 0
    share = float(row["scope"].split()[1])
    assert 0 < share < 0.95
    limits = report["limits"]
    left = limits["train"]["slack"]
    assert limits["calibrate"]["limit"] == left and limits["calibrate"]["slack"] < left
    assert limits["calibrate"]["spent"] == report["seconds"]["calibrate"] > 0
    log = (Path(report["folder"]) / "train.log").read_text()
    assert "s of the budget are kept back for its calibration" in log


def test_a_checkpoint_is_calibrated_on_the_rows_of_its_own_run(finished, tmp_path):
    cfg, report = finished
    checkpoint = str(Path(cfg.logs_dir) / "gptq" / "checkpoint.bin")
    same = dict(checkpoint=checkpoint, logs_dir=str(tmp_path), run_id="again")
    again = main(train_gpt.dataclasses.replace(cfg, **same))
    assert again["val_bpb"] == report["val_bpb"]
    first, second = artifact(report), artifact(again)
    assert all(torch.equal(t, second[name]) for name, t in first.items())
    assert "calibrate" not in again["limits"] and again["exit_code"] == 0
    read = dict(eval_only=report["artifact_path"], logs_dir=str(tmp_path), run_id="read")
    scored = main(train_gpt.dataclasses.replace(cfg, **read))
    assert scored["val_bpb"] == report["val_bpb"] and "calibrate" not in scored["seconds"]


def test_training_ends_early_by_the_reserve(tiny, monkeypatch):
    """As given; or as measured: the first batch, one for each of the others, and a tenth; but
    not what the very first one costs."""
    knobs = dict(**GPTQ, iterations=10**6, max_wallclock_seconds=100.0)
    trainer = trainer_of(tiny(**knobs, gptq_reserve_seconds=30.0))
    assert trainer.calibration_seconds() == 30
    trainer.keep_back(30.0)
    trainer.steps, trainer.elapsed = 70, 68.5
    assert not trainer.done()
    trainer.steps, trainer.elapsed = 71, 69.5
    assert trainer.done() and trainer.schedule.cfg.max_wallclock_seconds == 70
    assert trainer.cfg.max_wallclock_seconds == 100
    assert trainer.facts()["progress"]["reserve"] == 30

    trainer = trainer_of(tiny(**knobs | {"gptq_calibration_batches": 11}))
    batches = []
    trainer.hessians = batches.append
    took = iter((3000.0, 7000.0))
    trainer.run.milliseconds = lambda work: work() or next(took)
    assert trainer.calibration_seconds() == pytest.approx(1.1 * (3 + 10 * 2))
    assert batches == [1, 1, 3]
    took = iter((3000.0, 17000.0))
    with pytest.raises(train_gpt.Refusal, match="GPTQ_CALIBRATION_BATCHES=11"):
        trainer.calibration_seconds()
    for off in (dict(gptq_enabled=False), dict(max_wallclock_seconds=0.0)):
        assert trainer_of(tiny(**knobs | off)).calibration_seconds() == 0


def test_a_calibration_that_ends_too_late_is_warned_of_and_beyond_the_contest_over_the_limit(tiny):
    cfg = tiny(**GPTQ, max_wallclock_seconds=100.0)
    ledger = {"calibrate": 2.0}
    run = types.SimpleNamespace(ledger=lambda: ledger, cuda=False, world=1)

    def slack(cfg: Config, elapsed: float) -> float:
        return train_gpt.time_limits(cfg, run, elapsed, "sliding", 1.0)["calibrate"]["slack"]

    # the contest's 600 s, or a larger budget of one's own
    assert slack(cfg, 98.5) == 600 - 98.5 - 2
    assert slack(tiny(**GPTQ, max_wallclock_seconds=600.0), 598.5) == -0.5
    assert slack(tiny(**GPTQ, max_wallclock_seconds=900.0), 598.5) == 900 - 598.5 - 2
    exported = tiny(**GPTQ, max_wallclock_seconds=100.0, checkpoint="checkpoint.bin")
    assert train_gpt.time_limits(exported, run, 98.5, "sliding", 1.0).keys() == {"train"}

    warned = []
    run.warn = warned.append
    scores = {"live": types.SimpleNamespace(bpb=1.0)}
    for setting in (cfg, exported):
        for elapsed in (97.5, 98.5):
            trainer = types.SimpleNamespace(skipped=[], steps=9, elapsed=elapsed, reserve=1.0)
            trained = types.SimpleNamespace(trainer=trainer)
            train_gpt.closing_warnings(setting, run, trained, scores)
    late = "GPTQ: training ended 0.5 s too late for the 2.0 s of its calibration: "
    assert warned == [
        late + "train with GPTQ_RESERVE_SECONDS=2",
        late + "nothing for the leaderboard; train with GPTQ_ENABLED=1",
    ]


def test_a_run_that_goes_on_keeps_back_what_it_began_with(tiny, monkeypatch):
    """Not what the warm-up of this launch measures: steps before would have been planned by it."""
    knobs = dict(**GPTQ, iterations=3, max_wallclock_seconds=100.0)
    trainer = trainer_of(tiny(**knobs))
    trainer.keep_back(30.0)
    trainer.steps, trainer.elapsed, trainer.lengths = 1, 1.0, [64]
    saved = trainer.facts(), {name: w.clone() for name, w in trainer.tensors().items()}
    monkeypatch.setattr(Trainer, "calibration_seconds", lambda self: 7.0)
    trainer = trainer_of(tiny(**knobs))
    trainer.train()
    assert trainer.reserve == 7
    trainer = trainer_of(tiny(**knobs, resume=True))
    trainer.train(saved)
    assert trainer.steps == 3 and trainer.resumed == [1]
    assert trainer.reserve == 30 and trainer.schedule.cfg.max_wallclock_seconds == 70


def hessians_of(cfg: Config) -> dict[str, torch.Tensor]:
    return trainer_of(cfg).hessians(2)


def test_two_ranks_find_the_hessians_of_one(tiny, tmp_path):
    first, second = two_ranks(hessians_of, tiny(**SIGMA), folder=tmp_path)
    for name, h in hessians_of(tiny(**SIGMA)).items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], h)
