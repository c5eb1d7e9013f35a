"""QAT and QNA: the weights that the forward pass sees, and the latent ones behind them.

Would have caught: #975's QAT that touched none of its quantised tensors, #549's class flag that
torch 2.9 never re-traced, #145's recompile on the clock and its table outside of QAT, #989's
tensors that were fake-quantised but shipped as fp16 (and the reverse), #194's fake grid that was
not the shipped one, and #975's noise 12 times below the real step.
"""

import functools
import math

import pytest
import torch
from torch._dynamo.utils import counters

import train_gpt
from train_gpt import (
    FlatParameters,
    Grid,
    Loader,
    Run,
    Split,
    StepPlan,
    Trainer,
    Validation,
    WeightViews,
    build_model,
    encode_artifact,
    export_plan,
    quantised,
    read_artifact,
    sdpa,
)

ALL = dict(
    bigram_vocab_size=96,
    bigram_dim=16,
    ve_enabled=True,
    ve_dim=20,
    ve_layers="1,2",
    xsa_last_n=1,
    ln_scale=True,
    rope_dims=4,
    rope_ntk_len=32,
    negative_slope=0.5,
    smear_pos="post_norm",
    smear_mask_bos=True,
)
LATE_QAT = dict(qat_enabled=True, qat_start_kind="lr_scale", qat_start=0.5)
BLOCK_LINEARS = {
    f"blocks.{i}.{name}.weight"
    for i in range(3)
    for name in ("attn.c_q", "attn.c_k", "attn.c_v", "attn.proj", "mlp.fc", "mlp.proj")
}
SMALL_LINEARS = {"bigram.proj.weight", "value_embed.proj.weight"}
TABLES = {"tok_emb", "bigram.embed", "value_embed.embed"}


class Bench:
    """A model with rows of very different size (some above 1), its plan and its views."""

    def __init__(self, cfg):
        self.cfg, self.run = cfg, Run(cfg)
        self.model = build_model(cfg, self.run, sdpa)
        self.params, generator = (
            dict(self.model.named_parameters()),
            torch.Generator().manual_seed(0),
        )
        with torch.no_grad():
            for p in self.params.values():
                if p.ndim == 2:
                    p.copy_(
                        torch.randn(p.shape, generator=generator)
                        * torch.logspace(-2, 0.5, len(p))[:, None]
                    )
        self.plan = export_plan(cfg, self.model)
        self.views = WeightViews(
            cfg, self.run, self.model, FlatParameters(self.params, self.run), self.plan
        )
        self.latent = self.copy()

    def copy(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.params.items()}

    def seen(self, qat: bool = False, qna: float = 0.0, step: int = 0) -> dict[str, torch.Tensor]:
        """What a forward pass would see; the latent weights must come back."""
        latent = self.views.enter(StepPlan(1.0, 0.9, qat=qat, qna=qna), step)
        seen = self.copy()
        self.views.leave(latent)
        assert all(torch.equal(w, self.latent[name]) for name, w in self.copy().items())
        return seen

    def noise(self, width: float = 1.0, step: int = 0) -> dict[str, torch.Tensor]:
        """Seen minus latent of the tensors that QNA changes."""
        seen = self.seen(False, width, step)
        return {
            name: w - self.latent[name]
            for name, w in seen.items()
            if not torch.equal(w, self.latent[name])
        }


@pytest.fixture
def bench(tiny):
    return lambda **knobs: Bench(tiny(**knobs))


@pytest.fixture
def trainer(tiny):
    """trainer(**knobs) -> (Trainer before its first step, its first batch)"""

    def make(**knobs):
        cfg = tiny(**knobs)
        run, split = Run(cfg), Split(cfg, "train")
        model = build_model(cfg, run, sdpa)
        loader = Loader(cfg, run, split)
        batch = loader.next(cfg.train_seq_len)
        loader.close()
        return Trainer(
            cfg, run, model, export_plan(cfg, model), split, Validation(cfg, run, Split(cfg, "val"))
        ), batch

    return make


def changed(bench, seen) -> set[str]:
    return {name for name, w in seen.items() if not torch.equal(w, bench.latent[name])}


# ── QAT: which tensors ──
@pytest.mark.parametrize(
    "knobs, expected",
    [
        pytest.param(knobs, expected, id=name)
        for name, knobs, expected in [
            (
                "exported",
                dict(),
                BLOCK_LINEARS | {"bigram.embed", "value_embed.proj.weight"},
            ),  # bigram.proj: 512 weights, fp16
            (
                "tables_too",
                dict(quant_bits_embed=8),
                BLOCK_LINEARS | TABLES | {"value_embed.proj.weight"},
            ),
            (
                "everything",
                dict(keep_float_max_numel=0, quant_bits_embed=8),
                BLOCK_LINEARS | TABLES | SMALL_LINEARS,
            ),
            ("large", dict(keep_float_max_numel=2000), {n for n in BLOCK_LINEARS if "mlp" in n}),
            (
                "attention_fp16",
                dict(quant_bits_attn=16),
                {n for n in BLOCK_LINEARS if "mlp" in n}
                | {"bigram.embed", "value_embed.proj.weight"},
            ),
            (
                "kept_by_name",
                dict(fp16_keep_name_patterns="blocks.2.attn.c_k, mlp.fc,bigram"),
                {n for n in BLOCK_LINEARS if "mlp.fc" not in n} - {"blocks.2.attn.c_k.weight"}
                | {"value_embed.proj.weight"},
            ),
            (
                "linears",
                dict(qat_scope="linears", quant_bits_embed=8),
                BLOCK_LINEARS | SMALL_LINEARS,
            ),  # no tables
            (
                "linears_attention",
                dict(qat_scope="linears", quant_bits_mlp=16),
                {n for n in BLOCK_LINEARS if "attn" in n} | SMALL_LINEARS,
            ),
            ("small_linears", dict(qat_scope="small_linears"), SMALL_LINEARS),
            ("block_linears", dict(qat_scope="block_linears"), BLOCK_LINEARS),
        ]
    ],
)
def test_qat_covers_its_scope(bench, knobs, expected):
    b = bench(**{**ALL, "num_kv_heads": 4, "qat_enabled": True, **knobs})
    exported = {name for name, how in b.plan.items() if isinstance(how, Grid)}
    assert changed(b, b.seen(qat=True)) == expected
    if "qat_scope" not in knobs:
        assert expected == exported
    assert b.run.activity["QAT"].tensors == len(expected)
    assert b.run.activity["QAT"].params == sum(b.params[name].numel() for name in expected)


# ── QAT: which values ──
@pytest.mark.parametrize("bits", (5, 6, 8))
@pytest.mark.parametrize("clip", ("amax", "quantile", "search5"))
@pytest.mark.parametrize("codes", ("sym", "asym"))
@pytest.mark.parametrize("floor", (False, True))
def test_forward_sees_what_the_artifact_will_hold(bench, tmp_path, bits, clip, codes, floor):
    grid = dict(
        quant_bits_attn=bits,
        quant_bits_mlp=bits,
        quant_bits_bigram=bits,
        quant_bits_embed=8,
        quant_clip=clip,
        quant_codes=codes,
        quant_scale_floor=floor,
    )
    b = bench(**ALL, **grid, qat_enabled=True, keep_float_max_numel=0)
    (tmp_path / "a").write_bytes(encode_artifact(b.cfg, quantised(b.cfg, b.latent, b.plan)))
    shipped, seen, rounded = (
        read_artifact(tmp_path / "a")[1],
        b.seen(qat=True),
        BLOCK_LINEARS | SMALL_LINEARS | TABLES,
    )
    assert changed(b, seen) == rounded and shipped.keys() == seen.keys()
    for name in shipped:
        assert torch.equal(seen[name], shipped[name] if name in rounded else b.latent[name]), name


def test_different_bits_per_kind_reach_their_tensors(bench):
    b = bench(
        **ALL,
        qat_enabled=True,
        quant_bits_mlp=3,
        quant_bits_attn=4,
        quant_bits_bigram=5,
        quant_bits_embed=8,
        quant_clip="amax",
        quant_scale_floor=False,
        keep_float_max_numel=0,
    )
    seen = b.seen(qat=True)
    for name, bits in {
        "blocks.1.mlp.fc.weight": 3,
        "blocks.1.attn.c_q.weight": 4,
        "bigram.embed": 5,
        "bigram.proj.weight": 5,
        "value_embed.proj.weight": 5,
        "value_embed.embed": 8,
        "tok_emb": 8,
    }.items():
        assert torch.equal(seen[name], Grid(bits).fake_quantise(b.latent[name])), name


def test_qat_grid_amax_changes_the_clip_only(bench):
    b = bench(qat_enabled=True, qat_grid="amax", quant_clip="search5")
    name, seen = "blocks.0.mlp.fc.weight", b.seen(qat=True)
    assert torch.equal(seen[name], Grid(6, "amax", "sym", True).fake_quantise(b.latent[name]))
    assert b.plan[name] == Grid(6, "search5", "sym", True)


@pytest.mark.parametrize("bits", (3, 6))
def test_qat_bits_changes_the_bits_that_training_sees_alone(bench, bits):
    b = bench(qat_enabled=True, qat_bits=bits, quant_bits_attn=8, quant_bits_mlp=4)
    seen = b.seen(qat=True)
    for name, shipped in (("blocks.0.mlp.fc.weight", 4), ("blocks.1.attn.c_q.weight", 8)):
        faked = Grid(bits, "quantile", "sym", True).fake_quantise(b.latent[name])
        assert torch.equal(seen[name], faked)
        assert b.plan[name].bits == shipped


# ── QAT: gradients ──
@pytest.mark.parametrize("phase", (dict(qat=True), dict(qna=1.0)), ids=str)
def test_the_gradient_is_that_of_the_seen_weights(trainer, phase):
    t, (ids, targets) = trainer(
        **ALL,
        **LATE_QAT,
        qna_enabled=True,
        keep_float_max_numel=0,
        quant_bits_embed=8,
        grad_clip_norm=0.0,
    )
    before = {name: p.detach().clone() for name, p in t.model.named_parameters()}
    latent = t.views.enter(StepPlan(1.0, 0.9, **phase), 0)
    seen = {name: p.detach().clone().requires_grad_() for name, p in t.model.named_parameters()}
    t.views.leave(latent)
    by_hand = torch.autograd.grad(
        torch.func.functional_call(t.model, seen, (ids, targets)).mean(), list(seen.values())
    )
    t.optimiser.step = lambda k: None
    t.step((ids, targets), StepPlan(1.0, 0.9, **phase))
    for (name, p), gradient in zip(t.model.named_parameters(), by_hand, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-7, msg=name)
        assert torch.equal(p, before[name]), name


# ── QNA ──
@pytest.mark.parametrize("floor", (False, True))
def test_noise_is_uniform_within_half_a_step_of_the_exported_grid(bench, floor):
    b = bench(**ALL, qna_enabled=True, quant_scale_floor=floor)
    grids = {name: how for name, how in b.plan.items() if isinstance(how, Grid)}
    noise = b.noise()
    assert noise.keys() == grids.keys()
    for name, n in noise.items():
        assert (
            n.abs() <= 0.5 * grids[name].scale(b.latent[name]) + 1e-6 * b.latent[name].abs() + 1e-7
        ).all(), name
    steps = torch.cat(
        [(n / grids[name].scale(b.latent[name])).flatten() for name, n in noise.items()]
    )
    assert abs(steps.mean()) < 4 / math.sqrt(12 * len(steps))
    assert steps.std() == pytest.approx(1 / math.sqrt(12), rel=0.02) and steps.abs().max() > 0.49


def test_noise_on_the_row_alone_ignores_the_floor_and_the_clip(bench):
    name = "blocks.0.attn.c_q.weight"
    knobs = dict(qna_enabled=True, quant_clip="search5")
    shipped, row = (bench(**knobs, qna_grid=grid).noise()[name] for grid in ("export", "row"))
    ratio = (row / shipped).nanmedian(dim=1).values
    b = bench()
    w = b.latent[name]
    exported = Grid(6, "search5", "sym", True).scale(w).squeeze(1)
    torch.testing.assert_close(ratio, w.abs().amax(1) / 31 / exported, rtol=0.03, atol=0)
    assert ratio.min() < 0.1 and ratio.max() > 0.97


@pytest.mark.parametrize(
    "scope, expected",
    [
        ("block_linears", BLOCK_LINEARS),
        ("small_linears", SMALL_LINEARS),
        ("linears", BLOCK_LINEARS | SMALL_LINEARS),
        ("exported", BLOCK_LINEARS | SMALL_LINEARS | TABLES),
    ],
)
def test_noise_covers_its_scope(bench, scope, expected):
    knobs = dict(quant_bits_embed=8, keep_float_max_numel=0, qna_scope=scope)
    b = bench(**ALL, **knobs, qna_enabled=True)
    assert b.noise().keys() == expected
    assert b.run.activity["QNA"].scope == scope
    assert b.run.activity["QNA"].tensors == len(expected)


def test_noise_scales_with_its_width(bench):
    b = bench(qna_enabled=True)
    for full, half in zip(b.noise(1.0).values(), b.noise(0.5).values(), strict=True):
        torch.testing.assert_close(half, full / 2, rtol=0, atol=1e-6)


def test_noise_follows_the_learning_rate_until_its_stop(tiny):
    cfg = tiny(
        qna_enabled=True, qna_magnitude=2.0, qna_stop_scale=0.3, iterations=20, warmdown_iters=10
    )
    widths = [train_gpt.Schedule(cfg).at(step, 0.0).qna for step in range(20)]
    assert widths == pytest.approx([2.0] * 11 + [2 * s / 10 for s in range(9, 2, -1)] + [0, 0])


def test_noise_is_new_in_every_step_and_alike_for_every_rank(bench):
    a, b, other = bench(qna_enabled=True), bench(qna_enabled=True), bench(qna_enabled=True, seed=7)
    b.run.rank = 1
    torch.manual_seed(99)  # the ranks' global generators may differ
    for name, n in a.noise(step=3).items():
        assert torch.equal(n, b.noise(step=3)[name])
        assert (n != a.noise(step=4)[name]).float().mean() > 0.99
        assert (n != other.noise(step=3)[name]).float().mean() > 0.99


def test_no_two_matrices_share_their_noise(bench):
    noise = bench(qna_enabled=True, quant_scale_floor=True).noise()
    steps = {n.flatten()[:200].double().numpy().tobytes() for n in noise.values()}
    assert len(steps) == len(noise) > 10


# ── off ──
def test_off_is_absent(bench):
    b = bench(**ALL)
    versions = {name: (p.data_ptr(), p._version) for name, p in b.params.items()}
    assert (
        b.views.stacks == {} and b.views.enter(StepPlan(1.0, 0.9), 0) == [] and not b.run.activity
    )
    b.views.leave([])
    assert versions == {
        name: (p.data_ptr(), p._version) for name, p in b.params.items()
    }  # never written


class NoViews:
    """A build without QAT and QNA."""

    def __init__(self, *_):
        self.techniques = {}

    def acting(self, _):
        return []

    def enter(self, *_):
        return None

    def leave(self, _):
        pass


@pytest.mark.parametrize(
    "knobs", (dict(), dict(qat_enabled=True, qat_start_kind="lr_scale", qat_start=0.0)), ids=str
)
def test_before_it_starts_training_is_that_of_a_build_without_it(trainer, monkeypatch, knobs):
    t, _ = trainer(**knobs)
    t.train()
    monkeypatch.setattr(train_gpt, "WeightViews", NoViews)
    plain, _ = trainer()
    plain.train()
    assert t.loss == plain.loss
    assert all(
        torch.equal(a, b)
        for a, b in zip(t.model.parameters(), plain.model.parameters(), strict=True)
    )


def test_turning_qat_on_changes_the_training(trainer):
    losses = []
    for knobs in (dict(), LATE_QAT, dict(qat_enabled=True)):
        t, _ = trainer(**knobs, train_log_every=1, iterations=8, warmdown_iters=8)
        seen = []

        def note(now: StepPlan, t=t, seen=seen) -> None:
            seen.append((t.loss, now.qat))

        t.report = note
        t.train()
        losses.append([loss for loss, _ in seen])
        first = {0: 8, 1: 5, 2: 0}[len(losses) - 1]  # lr scale (8 - step) / 8 < 0.5 from step 5
        assert [on for _, on in seen] == [step >= first for step in range(8)]
    off, late, always = losses
    assert late[:5] == off[:5] and all(a != b for a, b in zip(late[5:], off[5:], strict=True))
    assert all(
        a != b for a, b in zip(always[1:], off[1:], strict=True)
    )  # at step 0 the projections are zero on any grid


# ── torch.compile ──
PHASES = (
    StepPlan(1.0, 0.9),
    StepPlan(1.0, 0.9, qna=0.7),
    StepPlan(1.0, 0.9, qat=True),
    StepPlan(1.0, 0.9),
)


def test_compiled_equals_eager_after_every_phase_flip_and_never_compiles_again(
    trainer, monkeypatch
):
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    knobs = dict(**ALL, **LATE_QAT, qna_enabled=True, quant_bits_mlp=3, quant_bits_attn=3)
    knobs |= dict(num_layers=2, ve_layers="1", tied_embed_init_std=0.3)
    (eager, batch), (compiled, _) = (trainer(**knobs, compile=mode) for mode in ("0", "1"))
    assert compiled.run.compile and compiled.forward is not compiled.model
    with torch.no_grad():  # so that every view changes the loss
        for t in (eager, compiled):
            for name, p in t.model.named_parameters():
                if name.endswith("proj.weight"):
                    p.copy_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    losses, graphs = {}, []
    for t in (eager, compiled):
        t.optimiser.step, losses[t] = (
            lambda k: None,
            [],
        )  # no learning: phase after phase on the same weights
        for k in PHASES:
            t.step(batch, k)
            losses[t].append(t.loss)
            graphs.append(counters["stats"]["unique_graphs"])
        del t.optimiser.step
        t.train()  # with learning, and the phases by the schedule
        losses[t].append(t.loss)
    assert losses[compiled] == pytest.approx(losses[eager], abs=2e-5)
    none, noisy, snapped, again, _ = losses[compiled]
    assert none == again and abs(noisy - none) > 1e-3 and abs(snapped - none) > 1e-3
    for (name, p), q in zip(
        compiled.model.named_parameters(), eager.model.parameters(), strict=True
    ):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-3, msg=name)
    assert {name: len(a.steps) for name, a in compiled.run.activity.items()} == {
        "QNA": 5,
        "QAT": 1,
        "WARMDOWN": 3,
    }
    assert graphs[4:] == graphs[4:5] * 4 and compiled.recompiles == 0
    assert not counters["recompiles"] and not counters["graph_break"]
    torch._dynamo.reset()
