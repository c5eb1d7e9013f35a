"""What only a CUDA GPU can show: compiled bf16 training, its kernels,
and that nothing but rounding depends on the device.

    GOLF_GPU=1 python -m pytest tests/test_gpu.py

On one GPU it takes under 3 minutes; anywhere else the GPU's half is skipped.
Every body takes a device, so that on a CPU its half that needs no GPU runs in the suite. Would have
caught: a phase that compiles on the clock (#145, #549), fake weights that are not the shipped ones
(#194, #989), a kernel that is wrong once it is compiled, a division by a number that CUDA computes
as a product (pytorch#191495), averages kept in bf16 (#989).
"""

import dataclasses
import functools
import itertools
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY
from test_optimiser import everything_of, matrices, normal, other_parameter
from test_score import documents, lively_model, setting  # noqa: F401
from test_views import ALL, Bench
from torch._dynamo.utils import counters
from torch.utils._triton import has_triton

import train_gpt
from train_gpt import (
    BOS,
    CLIP_QUANTILES,
    COEFFICIENTS,
    KERNELS,
    PACKAGES,
    Averages,
    Config,
    Documents,
    FlatParameters,
    Grid,
    Loader,
    Optimiser,
    Run,
    Split,
    Validation,
    attention_function,
    build_model,
    document_pieces,
    document_windows,
    encode_artifact,
    export_plan,
    pack,
    quantised,
    read_artifact,
    score,
    sdpa,
    windows,
)

GPU = torch.cuda.is_available()  # conftest.py hides it unless GOLF_GPU=1
# Whether code can be generated for the GPU is asked once in a process, and must not be asked while
# a test of the CPU hides the GPU
has_triton()
NEEDS_GPU = pytest.mark.skipif(not GPU, reason="needs a CUDA GPU and GOLF_GPU=1 in the environment")
EACH_DEVICE = ["cpu", pytest.param("cuda", marks=NEEDS_GPU)]


@pytest.fixture(params=EACH_DEVICE)
def device(request) -> str:
    return request.param


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compile_on(device: str):
    """torch.compile as on a GPU; on a CPU the graphs alone, as code takes minutes to generate."""
    return torch.compile if device == "cuda" else functools.partial(torch.compile, backend="eager")


def run_on(cfg: Config, device: str, dtype: torch.dtype | None = None) -> Run:
    """A Run on this device, whatever else the machine has.

    dtype: of activations; None: the device's own.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: device == "cuda")
        run = Run(cfg)
    run.dtype = dtype or run.dtype
    return run


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference, relative."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


# ── (a, g) a whole compiled run ───────────────────────────────────────────────────────────────────
PHASES = dict(
    iterations=24,
    warmup_steps=2,
    warmdown_iters=16,
    train_log_every=4,
    val_loss_every=8,
    doc_isolated_eval=True,
    doc_mask=True,
    compile="1",
    qna_enabled=True,
    qat_enabled=True,
    qat_start_kind="iter_frac",
    qat_start=0.5,
    swa_every=2,
    swa_start_kind="iter_frac",
    swa_start_frac=0.5,
    ema_enabled=True,
    ema_decay=0.9,
    model_dim=128,
    num_layers=2,
)
ARMS = {"SWA": dict(swa_enabled=True, average="swa"), "SQWA": dict(sqwa_enabled=True)}


# On a CPU one of them: what is compiled is the same, and test_average.py knows the other.
EACH_RUN = [
    ("SQWA", "cpu"),
    pytest.param(("SWA", "cuda"), marks=NEEDS_GPU),
    pytest.param(("SQWA", "cuda"), marks=NEEDS_GPU),
]


@pytest.fixture(scope="module", params=EACH_RUN, ids=str)
def finished(request, data, tmp_path_factory) -> SimpleNamespace:
    """A run through every phase: its result and configuration, and what broke its graphs."""
    average, device = request.param
    torch._dynamo.reset()
    paths = dict(
        data_path=str(data),
        tokenizer_path=str(data / "tokenizer.model"),
        logs_dir=str(tmp_path_factory.mktemp("logs")),
    )
    cfg = Config(**TINY | PHASES | ARMS[average] | paths, run_id="run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: device == "cuda")
        patch.setattr(torch, "compile", compile_on(device))
        report = train_gpt.main(cfg)
    return SimpleNamespace(
        report=report,
        cfg=cfg,
        device=device,
        average=average,
        breaks=dict(counters["graph_break"]),
    )


def test_every_phase_flips_without_a_recompile_after_the_warm_up(finished):
    r, names = (
        finished.report,
        {
            "QNA",
            "QAT",
            "EMA",
            finished.average,
            "WARMDOWN",
            "SMEAR_GATE",
            "DOC_MASK",
            "DOC_ISOLATED_EVAL",
        },
    )
    assert r["exit_code"] == 0 and r["recompiles"] == 0 and not finished.breaks and r["compile"]
    assert r["toggles"].keys() == names and r["inactive"] == []
    first = {name: row["first_step"] for name, row in r["toggles"].items()}
    assert (first["QNA"], first["EMA"], first["QAT"], first["WARMDOWN"]) == (
        0,
        0,
        12,
        9,
    ) and 11 <= first[finished.average] <= 14
    assert r["dtype"] == ("torch.bfloat16" if finished.device == "cuda" else "torch.float32")


def test_what_was_scored_is_what_can_be_read_back(finished):
    scores, cfg = (
        finished.report["scores"],
        dataclasses.replace(finished.cfg, run_id="again", eval_only="", compile="0"),
    )
    assert {"live", "averaged", "quantised", "sliding", "documents"} <= scores.keys()
    knobs, state = read_artifact(Path(finished.report["artifact_path"]))
    run = run_on(cfg, "cpu")
    model, val = build_model(cfg, run, sdpa), Validation(cfg, run, Split(cfg, "val"))
    model.load_state_dict(state)
    ways = {"quantised": windows(0, val.n, 64, 0), "sliding": windows(0, val.n, 64, 16)}
    for name, where in (ways | {"documents": document_windows(val, 64, 16)}).items():
        assert score(cfg, run, model, val, where).bpb == pytest.approx(
            scores[name]["bpb"], abs=5e-3
        ), name
    assert knobs["model_dim"] == 128 and finished.report["val_bpb"] == scores["documents"]["bpb"]


def test_peak_memory_is_reported(finished):
    peak, params = finished.report["peak_memory_bytes"], finished.report["params"]
    assert peak > 4 * 4 * params  # weights, gradients, momenta, an average
    if finished.device == "cuda":
        assert peak <= torch.cuda.get_device_properties(0).total_memory


# ── (b, i) quantisation ───────────────────────────────────────────────────────────────────────────
GRIDS = [
    (bits, codes, floor)
    for bits in range(2, 9)
    for codes in ("sym", "asym")
    for floor in (False, True)
]


@pytest.mark.parametrize("clip", CLIP_QUANTILES)
def test_qat_sees_what_the_artifact_holds_bit_for_bit(tiny, tmp_path, device, clip, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cuda")
    for bits, codes, floor in GRIDS:
        cfg = tiny(
            **ALL,
            qat_enabled=True,
            keep_float_max_numel=0,
            quant_bits_mlp=bits,
            quant_bits_attn=bits,
            quant_clip=clip,
            quant_bits_bigram=bits,
            quant_bits_embed=bits,
            quant_codes=codes,
            quant_scale_floor=floor,
        )
        b = Bench(cfg)  # rows of very different size, some above 1
        seen, path = b.seen(qat=True), tmp_path / "artifact.bin"
        path.write_bytes(encode_artifact(cfg, quantised(cfg, b.latent, b.plan)))
        _, state = read_artifact(path)
        grids = [name for name, how in b.plan.items() if isinstance(how, Grid)]
        assert len(grids) == 23 and seen[grids[0]].device.type == device
        assert [name for name in grids if not torch.equal(seen[name].cpu(), state[name])] == [], (
            bits,
            codes,
            floor,
        )


def telling_rows(top: int, columns: int) -> torch.Tensor:
    """Rows whose step is another fp16 number if |w| / top is computed as |w| * (1 / top),
    as CUDA does for a Python number.
    """
    midpoints = (
        torch.outer(2.0 ** torch.arange(-8, 2), 1 + (torch.arange(1024) + 0.5) / 1024).flatten()
        * top
    )
    largest = torch.cat([midpoints, *(midpoints.nextafter(midpoints * sign) for sign in (0, 9))])
    telling = largest[(largest / top).half() != (largest * (1 / torch.tensor(float(top)))).half()]
    telling = telling[(telling > 1) & (telling < 4)][:8]
    assert len(telling) == 8
    return torch.linspace(-1, 1, columns) * telling[:, None]


@pytest.mark.parametrize(
    "clip, floor", [*itertools.product(CLIP_QUANTILES, (False, True)), ("sigma", False)]
)
def test_an_artifact_does_not_depend_on_the_device_that_packed_it(tiny, device, clip, floor):
    cfg = tiny(
        **ALL,
        keep_float_max_numel=0,
        quant_clip=clip,
        quant_scale_floor=floor,
        quant_bits_mlp=5,
        quant_bits_bigram=4,
        quant_bits_embed=8,
        mlp_clip_sigmas=3.0,
    )
    model = build_model(cfg, run_on(cfg, "cpu"), sdpa)
    plan, state = (
        export_plan(cfg, model),
        {name: p.detach().clone() for name, p in model.named_parameters()},
    )
    for i, (name, w) in enumerate(state.items()):
        if w.ndim == 2:
            w.add_(normal(*w.shape, seed=i) * torch.logspace(-2, 0.5, len(w))[:, None])
        else:
            w.add_(0.1)
        if isinstance(plan[name], Grid):
            w[:8] = telling_rows(plan[name].top, w.shape[1])[: len(w)]
    moved = {name: w.to(device) for name, w in state.items()}
    for compressor in ("zstd", "brotli", "ans"):
        cfg = dataclasses.replace(cfg, compressor=compressor)
        here, there = (
            encode_artifact(cfg, quantised(cfg, weights, plan)) for weights in (state, moved)
        )
        assert here == there, compressor
    pruned, there = (train_gpt.prune(cfg, weights, 0.1) for weights in (state, moved))
    assert all(torch.equal(w, there[name].cpu()) for name, w in pruned.items())


@NEEDS_GPU
def test_gptq_and_lqer_of_a_bf16_run_make_the_same_bytes_again(tiny, monkeypatch):
    """Two runs of one machine; CHECKPOINT is to export what its run has exported."""
    monkeypatch.setattr(torch, "compile", compile_on("cuda"))
    export = dict(gptq_enabled=True, gptq_calibration_batches=2, lqer_enabled=True)
    grid = dict(quant_clip="sigma", quant_scale_floor=False, keep_float_max_numel=64)
    knobs = dict(**export, **grid, lqer_fit="refit", iterations=4, compile="1")
    cfg = tiny(**knobs, run_id="first")
    reports = [train_gpt.main(cfg)]
    checkpoint = Path(cfg.logs_dir) / "first" / "checkpoint.bin"
    reports.append(train_gpt.main(tiny(**knobs, run_id="again", checkpoint=str(checkpoint))))
    first, again = (Path(report["artifact_path"]).read_bytes() for report in reports)
    assert first == again
    assert reports[0]["recompiles"] == 0 and reports[0]["dtype"] == "torch.bfloat16"
    assert reports[0]["toggles"]["GPTQ"]["active"] and reports[0]["toggles"]["LQER"]["active"]


# ── (c) attention ─────────────────────────────────────────────────────────────────────────────────
def formula(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first: torch.Tensor | None = None
) -> torch.Tensor:
    """The formula in the dtype of q: (B, T, heads, d), k and v with fewer heads.

    first (B, T): the first token of the row that each attends to.
    """
    k, v = (z.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for z in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    if first is not None:
        key = torch.arange(q.shape[1], device=q.device)
        hidden = hidden | (key < first[:, None, :, None])
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(hidden, -math.inf).softmax(-1), v)


def both_ways(attend, tensors: list[torch.Tensor], weight: torch.Tensor) -> list[torch.Tensor]:
    """Output, and gradients of q, k and v where they have any."""
    y = attend(*tensors)
    if not y.requires_grad:
        return [y]
    return [y, *torch.autograd.grad((y.float() * weight).sum(), tensors)]


def documents_of(device: str, how: str) -> Documents | None:
    """None; or of two rows of 512: in pieces of any length; all at most 64; all of 3 tokens.

    The rows differ in the blocks of 128 tokens that a block attends to.
    """
    if how == "none":
        return None
    ids = torch.full((2, 512), 7)
    if how == "too many":
        ids[:, ::3] = BOS
    ids[0, [0, 5, 6, 200]] = BOS
    ids[1, [390, 511]] = BOS
    return document_pieces(ids.to(device), 64 if how == "cut" else 0)


@pytest.mark.parametrize("compiled", (False, True), ids=("eager", "compiled"))
@pytest.mark.parametrize("how", ("none", "documents", "cut", "too many"))
@pytest.mark.parametrize("name", [*KERNELS, "flex", *PACKAGES])
def test_every_attention_kernel_that_works_agrees_with_the_formula(device, name, how, compiled):
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if device == "cpu" and name == "flex" and compiled and how != "documents":
        pytest.skip("takes seconds to compile: once is enough")
    gradients = device == "cuda" or name != "flex"  # which has none on a CPU
    tensors = [
        normal(2, 512, heads, 64, seed=i).to(device, dtype).requires_grad_(gradients)
        for i, heads in enumerate((8, 4, 4))
    ]
    weight = normal(2, 512, 8, 64, seed=9).to(device)
    pieces = documents_of(device, how)

    def attention(*tensors: torch.Tensor) -> torch.Tensor:
        prepared = None if pieces is None else kernel.prepare(pieces, dtype)
        return kernel(*tensors, prepared)

    try:
        kernel = attention_function(name)
        both_ways(attention, tensors, weight)
    except (ImportError, RuntimeError, NotImplementedError) as problem:
        assert name != "sdpa"
        pytest.skip(f"{name} does not work here: {str(problem).splitlines()[0]}")
    attend = compile_on(device)(attention, fullgraph=True, dynamic=False) if compiled else attention
    found = both_ways(attend, tensors, weight)
    if how == "too many" and kernel.prepare is pack:
        assert found[0].isnan().all()
        return
    first = None if pieces is None else pieces.first
    exact = both_ways(
        functools.partial(formula, first=first),
        [t.detach().float().requires_grad_(gradients) for t in tensors],
        weight,
    )
    # bf16 has 8 bits: products of rounded probabilities and values
    limit = 0.03 if device == "cuda" else 1e-5
    for what, one, expected in zip("yqkv", found, exact, strict=False):
        assert one.dtype == dtype and error(one, expected) < limit, what
    assert len(found) == len(exact)


# ── (d) Muon ──────────────────────────────────────────────────────────────────────────────────────
def muon_reference(
    weights: list, gradients: list[list], cfg: Config, momentum: float
) -> list[torch.Tensor]:
    """Muon in fp64, a matrix at a time (K. Jordan 2024)."""
    lr, decay = cfg.matrix_lr, cfg.muon_wd
    triples = (COEFFICIENTS[cfg.muon_coeffs] * 5)[:5]
    found = []
    for i, initial in enumerate(weights):
        w = initial.double()
        buffer = torch.zeros_like(w)
        for step in gradients:
            g = step[i].double()
            buffer = momentum * buffer + g
            x = g + momentum * buffer
            if cfg.muon_row_normalize:
                x = x / x.norm(dim=1, keepdim=True)
            x = (x.T if w.shape[0] > w.shape[1] else x) / x.norm()
            for a, b, c in triples:
                gram = x @ x.T
                x = a * x + (b * gram + c * gram @ gram) @ x
            x = x.T if w.shape[0] > w.shape[1] else x
            factor = max(1, w.shape[0] / w.shape[1]) ** 0.5
            w = (1 - lr * decay) * w - lr * factor * x
        found.append(w)
    return found


SHAPES = [(128, 128)] * 4 + [(64, 128)] * 2 + [(384, 128)] * 2 + [(128, 384)] * 2


def optimiser_on(device: str, cfg: Config) -> tuple[Optimiser, dict[str, torch.nn.Parameter]]:
    """An optimiser of matrices and a vector, and the matrices."""
    run = SimpleNamespace(world=1, rank=0, device=torch.device(device), compile=True)
    params = matrices(*SHAPES)
    flat = FlatParameters(params | other_parameter(), run)
    return Optimiser(flat, cfg, run), params


@pytest.mark.parametrize("rows", (False, True), ids=("matrices", "rows"))
@pytest.mark.parametrize("coeffs", COEFFICIENTS)
def test_muon_agrees_with_fp64(device, coeffs, rows, monkeypatch):
    monkeypatch.setattr(torch, "compile", compile_on(device))
    cfg = Config(matrix_lr=0.05, muon_wd=0.1, muon_coeffs=coeffs, muon_row_normalize=rows)
    optimiser, params = optimiser_on(device, cfg)
    flat = optimiser.flat
    before = [p.detach().cpu().clone() for p in params.values()]
    gradients = [
        [normal(*shape, seed=100 * step + i) for i, shape in enumerate(SHAPES)] for step in range(3)
    ]
    for step in gradients:
        for p, g in zip(params.values(), step, strict=True):
            p.grad.copy_(g)
        with torch.no_grad():
            flat.gather(optimiser.muon(train_gpt.StepPlan(1.0, 0.9)))
    reference = muon_reference(before, gradients, cfg, 0.9)
    for p, w, exact in zip(params.values(), before, reference, strict=True):
        assert p.device.type == device and p.dtype == torch.float32
        assert error(p.detach().cpu() - w, exact - w) < (
            0.05 if device == "cuda" else 1e-4
        )  # bf16: 2 to 3.5 % on a CPU


@pytest.mark.parametrize("what", ("a matrix", "the loss", "too large"))
def test_a_step_that_is_not_finite_changes_no_bit_and_nothing_waits(device, what, monkeypatch):
    monkeypatch.setattr(torch, "compile", compile_on(device))
    optimiser, _ = optimiser_on(device, Config(muon_row_normalize=True, adam_wd=0.1))
    flat = optimiser.flat

    def step() -> None:
        flat.reduce(0.3)
        optimiser.step(train_gpt.StepPlan(1.0, 0.9))

    flat.proper_gradients.copy_(normal(len(flat.proper_gradients)))
    step()
    before = everything_of(optimiser)
    broken = {
        "a matrix": (flat.views(flat.gradients)["w5"][1], math.nan),
        "the loss": (flat.loss, math.nan),
        "too large": (flat.views(flat.gradients)["w0"], 1e30),  # its square is infinite
    }
    tensor, value = broken[what]
    tensor.fill_(value)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert not math.isfinite(sum(flat.outcome()[:2]))
    assert all(map(torch.equal, everything_of(optimiser), before))
    flat.gradients.zero_()
    step()
    assert not any(map(torch.equal, everything_of(optimiser), before))


# ── the model of the records ──
RECORD = dict(
    num_layers=5,
    smear_gate=False,
    smear_gate_enabled=True,
    gate_window=12,
    smear_mask_bos=True,
    sparse_attn_gate_enabled=True,
    sparse_attn_gate_init_std=0.1,
    skip_gates_enabled=True,
    num_loops=2,
    loop_start=1,
    loop_end=2,
    parallel_start_layer=3,
    asym_logit_rescale=True,
    negative_slope=0.5,
    xsa_last_n=5,
    rope_dims=4,
    ln_scale=True,
    doc_mask=True,
)


# One of the two is enough on a CPU, where it takes six seconds
EACH_MODEL = [("cpu", 2), *(pytest.param("cuda", n, marks=NEEDS_GPU) for n in (0, 2))]


@pytest.mark.parametrize("device, loops", EACH_MODEL, indirect=["device"])
def test_the_compiled_model_of_the_records_agrees_with_fp64(tiny, device, loops):
    found = []
    for where, dtype in ((device, torch.float32), ("cpu", torch.float64)):
        cfg = tiny(**RECORD)
        run = run_on(cfg, where, dtype)
        model = build_model(cfg, run, sdpa).to(run.dtype)
        with torch.no_grad():
            for i, p in enumerate(model.parameters()):
                p.add_(0.1 * normal(*p.shape, seed=i).to(p))
        model.loops = loops
        forward = model
        if dtype == torch.float32:
            forward = compile_on(device)(model, fullgraph=True, dynamic=False)
        ids = torch.arange(2 * 64, device=run.device).view(2, 64) * 7 % cfg.vocab_size
        ids[:, ::20] = BOS
        nats = forward(ids, ids.roll(1, 1))
        nats.mean().backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append({"nats": nats.detach()} | grads)
    mine, exact = found
    assert mine.keys() == exact.keys()
    for name, value in exact.items():
        assert error(mine[name].cpu(), value) < 1e-4, name


# ── (e) scores ────────────────────────────────────────────────────────────────────────────────────
def sliding_bpb(cfg: Config, run: Run) -> float:
    """BPB in sliding windows, of a model with the same random weights on every device."""
    model, val = build_model(cfg, run, sdpa), Validation(cfg, run, Split(cfg, "val"))
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.add_(0.05 * normal(*p.shape, seed=i).to(p.device))
    forward = torch.compile(model, dynamic=False, fullgraph=True) if run.compile else model
    return score(cfg, run, forward, val, windows(0, val.n, 64, 16)).bpb


def test_compiled_scores_equal_eager_ones(tiny, device, monkeypatch):
    monkeypatch.setattr(torch, "compile", compile_on(device))
    eager, compiled = (
        sliding_bpb(cfg, run_on(cfg, device)) for cfg in (tiny(compile="0"), tiny(compile="1"))
    )
    assert compiled == pytest.approx(eager, abs=1e-3 if device == "cuda" else 1e-6)


def test_compiled_adapters_and_phases_score_as_eager_ones(setting, device):  # noqa: F811
    """One graph for the adapters' only length, and one for phases, in which the weights learn."""
    adapters = dict(ttt_batch_size=3, ttt_chunk_size=64, ttt_lora_rank=2, ttt_lora_lr=0.01)
    phases = dict(phased_ttt_enabled=True, phased_ttt_num_phases=2, phased_ttt_prefix_docs=9)
    phases |= dict(global_ttt_lr=0.1, global_ttt_chunk_tokens=64)
    model = dict(num_layers=1, bigram_vocab_size=0, doc_mask=True, smear_gate=False)
    cfg = setting(ttt_mode="lora", **model, **adapters, **phases)
    blocks = []
    counters.clear()
    run = run_on(cfg, device, torch.float32)
    for compiled in (False, True):
        model = forward = lively_model(cfg, run)
        run.compile = compiled
        if compiled:
            forward = compile_on(device)(model, fullgraph=True, dynamic=False)
        val = Validation(cfg, run, Split(cfg, "val"))
        found = train_gpt.test_time_train(cfg, run, model, forward, val)
        assert found.acted and run.activity["PHASED_TTT_ENABLED"].steps
        blocks.append(torch.tensor(found.blocks))
    assert counters["stats"]["unique_graphs"] == 2
    torch.testing.assert_close(*blocks, rtol=1e-5, atol=1e-4)


def test_fp32_scores_equal_those_of_a_cpu(tiny, device):
    assert torch.get_float32_matmul_precision() == "highest"  # no TF32
    there, here = (
        sliding_bpb(cfg, run_on(cfg, where, torch.float32))
        for cfg, where in ((tiny(compile="0"), device), (tiny(compile="0"), "cpu"))
    )
    assert there == pytest.approx(here, abs=1e-6)


# ── (f) averages ──────────────────────────────────────────────────────────────────────────────────
def averages(cfg: Config, device: str) -> dict[str, dict[str, torch.Tensor]]:
    """The results of six updates, three of them snapshots, of the same weights on every device."""
    run = run_on(cfg, device)
    model = build_model(cfg, run, sdpa)
    params = dict(model.named_parameters())
    average = Averages(cfg, run, model, FlatParameters(params, run), export_plan(cfg, model))
    with torch.no_grad():
        for step in range(6):
            for i, p in enumerate(params.values()):
                p.add_(0.02 * normal(*p.shape, seed=100 * step + i).to(device))
            average.update(step % 2 == 1 and average.snapshots is not None)
    assert all(w.device.type == device for w in params.values())
    return {
        name: {n: w.cpu() for n, w in state.items()} for name, state in average.results().items()
    }


@pytest.mark.parametrize("kind", ("ema", "swa", "sqwa", "sqwa of ema"))
def test_averages_equal_those_of_a_cpu(tiny, device, kind):
    on = {f"{name}_enabled": name in kind.split(" of ") for name in ("ema", "swa", "sqwa")}
    on |= dict(keep_float_max_numel=0, quant_bits_embed=8)
    there, here = (averages(tiny(**ALL, **on, ema_decay=0.6), where) for where in (device, "cpu"))
    assert there.keys() == here.keys() == {*kind.split(" of ")}
    for name, state in here.items():
        for n, w in state.items():
            off = (
                there[name][n].cpu() - w.cpu()
            ).abs() > 1e-6  # fused multiply-add moves the EMA by an ulp: a code may flip
            assert off.float().mean() < (1e-3 if kind == "sqwa of ema" else 1e-9), f"{name} {n}"


# ── (h) the loader ────────────────────────────────────────────────────────────────────────────────
def test_batches_come_from_pinned_memory_and_equal_those_of_a_cpu(tiny, device, monkeypatch):
    pinned, pin = [], torch.Tensor.pin_memory

    def spy(tensor: torch.Tensor, *arguments) -> torch.Tensor:
        pinned.append((copy := pin(tensor, *arguments)).is_pinned())
        return copy

    monkeypatch.setattr(torch.Tensor, "pin_memory", spy)
    cfg = tiny()
    split = Split(cfg, "train")
    there, here = (
        Loader(cfg, run_on(cfg, device), split),
        Loader(cfg, run_on(tiny(), "cpu"), split),
    )
    for _ in range(5):
        pairs = zip(*(loader.next(cfg.train_seq_len) for loader in (there, here)), strict=True)
        for a, b in pairs:
            assert a.device.type == device and torch.equal(a.cpu(), b)
    there.close(), here.close()
    assert len(pinned) >= 10 and all(pinned) if device == "cuda" else not pinned


# ── the last, as what leaves its memory takes the GPU from all that come after it ─────────────────
@pytest.mark.parametrize("name", [*KERNELS, *PACKAGES, "flex"])
def test_a_kernel_scores_a_batch_as_the_formula_does(device, name):
    """As scoring calls it: compiled, without gradients, many rows of different documents."""
    rows, time, dtype = (32, 2048, torch.bfloat16) if device == "cuda" else (3, 256, torch.float32)
    tensors = [normal(rows, time, h, 64, seed=i).to(device, dtype) for i, h in enumerate((8, 4, 4))]
    ids = torch.full((rows, time), 7)
    for row in range(rows):
        ids[row, 37 * row % 300 :: 150 + 50 * row] = BOS
    ids = ids.to(device)

    def attention(*tensors: torch.Tensor) -> torch.Tensor:
        return kernel(*tensors, kernel.prepare(document_pieces(ids, 0), dtype))

    try:
        kernel = attention_function(name)
        attention(*tensors)
    except (ImportError, RuntimeError, NotImplementedError) as problem:
        assert name != "sdpa"
        pytest.skip(f"{name} does not work here: {str(problem).splitlines()[0]}")
    with torch.no_grad():
        found = compile_on(device)(attention, fullgraph=True, dynamic=False)(*tensors)
    first = document_pieces(ids, 0).first
    for row in range(rows):
        one = slice(row, row + 1)
        exact = formula(*(z[one].float() for z in tensors), first[one])
        assert error(found[one], exact) < (0.03 if device == "cuda" else 1e-5), row
