"""Muon, AdamW, the flat buffers, and the same training on 1, 2 and 3 ranks.

Would have caught: #199's gates that were in no optimiser group, #989's weight decay that never
reached Muon, #975's clip of each rank's own gradients before they are averaged, and ranks that
drift apart.
"""

import dataclasses
import functools
import math
import os
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import THREADS, TINY, until
from launch import serve
from torch.utils._python_dispatch import TorchDispatchMode

import train_gpt
from train_gpt import (
    FlatParameters,
    Optimiser,
    Run,
    Schedule,
    Split,
    StepPlan,
    Trainer,
    Validation,
    build_model,
    export_plan,
    newton_schulz,
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
ALONE = SimpleNamespace(world=1, rank=0, device="cpu", compile=False)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def matrices(*shapes: tuple) -> dict[str, torch.nn.Parameter]:
    return {
        f"w{i}": train_gpt.parameter(normal(*shape, seed=i), train_gpt.MLP_ROLE)
        for i, shape in enumerate(shapes)
    }


def make_trainer(cfg, attend=sdpa) -> Trainer:
    run = Run(cfg)
    model, val = build_model(cfg, run, attend), Validation(cfg, run, Split(cfg, "val"))
    return Trainer(cfg, run, model, export_plan(cfg, model), Split(cfg, "train"), val)


# ── workers on several ranks ──
def child(rank: int, world: int, folder: str, work, arguments) -> None:
    torch.set_num_threads(THREADS)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world
    )
    torch.save(work(rank, world, *arguments), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def on_ranks(world: int, folder, work, *arguments) -> list:
    """What work(rank, world, *arguments) returns on each of `world` processes joined by gloo."""
    serve()
    context = mp.start_processes(
        child, (world, str(folder), work, arguments), world, join=False, start_method="forkserver"
    )
    try:
        until(lambda: context.join(timeout=1), lambda: f"{world} ranks")
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(f"{folder}/{rank}.pt") for rank in range(world)]


SHAPES = [(8, 24)] + [(16, 8)] * 4 + [(16, 16)] * 5  # neither 2 nor 3 divides every bank


def other_parameter() -> dict[str, torch.nn.Parameter]:
    """AdamW takes no empty list."""
    return {"b": train_gpt.parameter(torch.zeros(9), train_gpt.CONTROL)}


def muon_steps(rank: int, world: int) -> list[torch.Tensor]:
    """Three Muon steps on gradients that are the same on every rank."""
    run = SimpleNamespace(world=world, rank=rank, device="cpu", compile=False)
    flat = FlatParameters((params := matrices(*SHAPES)) | other_parameter(), run)
    optimiser = Optimiser(flat, train_gpt.Config(matrix_lr=0.05, muon_wd=0.1), run)
    for step in range(3):
        for i, p in enumerate(params.values()):
            p.grad.copy_(normal(*p.shape, seed=100 * step + i))
        with torch.no_grad():
            flat.gather(optimiser.muon(StepPlan(1.0, 0.9)))
    return [p.detach() for p in params.values()]


def own_gradient(rank: int) -> torch.Tensor:
    """Nine numbers, padding, the loss, a place for the norm, and whether the rank was told to stop
    (rank 1 was), and has no rows (rank 2 has none), seconds of rank 0; then padding.
    """
    numbers = torch.cat((torch.tensor([10.0 * (-1) ** rank, 1.0]), 0.1 * normal(7, seed=rank)))
    ends = torch.tensor([2.0 + rank, 0.0, float(rank == 1), float(rank == 2), 6.0 * (rank == 0)])
    return torch.cat((numbers, torch.zeros(7), ends, torch.zeros(11)))


def everything(rank: int, world: int, cfg) -> dict:
    """What the tests below compare between the ranks, and between worlds."""
    flat = FlatParameters(other_parameter(), SimpleNamespace(world=world, rank=rank, device="cpu"))
    flat.gradients.copy_(own_gradient(rank))
    flat.reduce(clip=0.5)
    stats, losses = tuple(flat.outcome()), []
    trainer = make_trainer(dataclasses.replace(cfg, run_id=f"{world}-ranks"))
    trainer.report = lambda k: losses.append(trainer.loss)
    trainer.train()
    return dict(
        flat=flat.gradients,
        stats=stats,
        muon=muon_steps(rank, world),
        losses=losses,
        rank=trainer.run.rank,
        weights={name: p.detach() for name, p in trainer.model.named_parameters()},
        noise=len(trainer.run.activity["QNA"].steps),
    )


@pytest.fixture(scope="module")
def worlds(data, tmp_path_factory) -> dict[int, list[dict]]:
    """Number of ranks -> what each rank got. The 8 rows of a step do not divide by 3."""
    folders = {world: tmp_path_factory.mktemp(f"ranks{world}") for world in (1, 2, 3)}
    cfg = train_gpt.Config(
        **TINY
        | ALL
        | dict(
            data_path=str(data),
            tokenizer_path=str(data / "tokenizer.model"),
            logs_dir=str(folders[1]),
            qna_enabled=True,
            keep_float_max_numel=0,
            quant_bits_embed=8,
            train_log_every=1,
        )
    )
    return {1: [everything(0, 1, cfg)]} | {
        world: on_ranks(world, folders[world], everything, cfg) for world in (2, 3)
    }


@pytest.mark.parametrize("world", (1, 2, 3))
def test_the_mean_gradient_is_clipped_not_each_ranks_own(worlds, world):
    mean = torch.stack([own_gradient(rank) for rank in range(world)]).mean(0)
    gradients, mean[17] = mean[:16], mean[:16].norm()
    loss, norm, stopping, refused = mean[16:20].tolist()
    expected = torch.cat((gradients * min(0.5 / norm, 1), mean[16:]))
    for result in worlds[world]:
        torch.testing.assert_close(result["flat"], expected, rtol=1e-5, atol=1e-6)
        assert result["stats"] == pytest.approx((loss, norm, stopping, refused, 6 / world))


@pytest.mark.parametrize("world", (2, 3))
def test_muon_gives_the_same_on_several_ranks(worlds, world):
    for result in worlds[world]:
        for found, alone in zip(result["muon"], worlds[1][0]["muon"], strict=True):
            torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("world", (2, 3))
def test_every_rank_ends_with_identical_weights(worlds, world):
    first, *others = worlds[world]
    assert [result["rank"] for result in worlds[world]] == list(range(world))
    for other in others:
        assert other["losses"] == first["losses"]
        for name, w in other["weights"].items():
            assert torch.equal(w, first["weights"][name]), name


@pytest.mark.parametrize("world", (2, 3))
def test_several_ranks_train_what_one_trains(worlds, world):
    """Noise included: were it another on each rank, the mean gradient would be another."""
    alone, together = worlds[1][0], worlds[world][0]
    assert len(alone["losses"]) == TINY["iterations"] and alone["losses"][0] > alone["losses"][-1]
    assert together["noise"] > 0
    assert together["losses"] == pytest.approx(alone["losses"], abs=1e-5)
    for name, w in together["weights"].items():
        torch.testing.assert_close(w, alone["weights"][name], rtol=0, atol=1e-4, msg=name)


# ── groups ──
BLOCK_MATRICES = {
    f"blocks.{i}.{name}.weight"
    for i in range(3)
    for name in ("attn.c_q", "attn.c_k", "attn.c_v", "attn.proj", "mlp.fc", "mlp.proj")
}
TABLES = {"tok_emb", "bigram.embed", "value_embed.embed"}


@pytest.mark.parametrize(
    "bigram_proj_opt, embed_wd",
    [("muon", {}), ("adam", {"embed_wd": 0.0}), ("muon", {"embed_wd": 0.1})],
)
def test_every_parameter_is_in_exactly_the_group_it_should_be_in(tiny, bigram_proj_opt, embed_wd):
    cfg = tiny(**ALL, bigram_proj_opt=bigram_proj_opt, adam_wd=0.01, **embed_wd)
    model = build_model(cfg, Run(cfg), sdpa)
    flat, names = (
        FlatParameters(dict(model.named_parameters()), ALONE),
        {id(p): name for name, p in model.named_parameters()},
    )
    optimiser, muon = (
        Optimiser(flat, cfg, ALONE),
        [name for bank in flat.banks for name in bank.names],
    )
    spans = [
        (p.data_ptr(), p.grad.data_ptr(), 4 * p.numel())
        for g in optimiser.adamw.param_groups
        for p in g["params"]
    ]
    embed, scalar, smear = (
        [
            name
            for name, p in model.named_parameters()
            if 0 <= p.data_ptr() - start < size
            and p.grad.data_ptr() - gradient == p.data_ptr() - start
        ]
        for start, gradient, size in spans
    )
    assert sorted(muon + embed + scalar + smear) == sorted(names.values())
    assert set(muon) == BLOCK_MATRICES | (
        {"bigram.proj.weight"} if bigram_proj_opt == "muon" else set()
    )
    assert set(embed) == TABLES and set(smear) == {"smear.gate"}
    settings = [(g["lr"], g["betas"], g["weight_decay"]) for g in optimiser.adamw.param_groups]
    assert settings == [
        (0.03, (0.9, 0.95), embed_wd.get("embed_wd", 0.01)),
        (0.02, (0.9, 0.95), 0.01),
        (0.02, (0.9, 0.99), 0.01),
    ]
    kinds = [
        {(flat.shapes[name], model.get_parameter(name).role) for name in bank.names}
        for bank in flat.banks
    ]
    assert all(len(kind) == 1 for kind in kinds) and len(flat.banks) == len(set.union(*kinds))


def test_a_parameter_of_no_group_is_an_error(tiny):
    cfg = tiny()
    model = build_model(cfg, Run(cfg), sdpa)
    model.blocks[0].attn_scale.role = train_gpt.Role("nobody")
    with pytest.raises(KeyError, match="nobody"):
        Optimiser(FlatParameters(dict(model.named_parameters()), ALONE), cfg, ALONE)


@pytest.mark.parametrize("init", ("ortho", "default"))
def test_every_parameter_learns_within_two_steps(tiny, init):
    trainer = make_trainer(
        tiny(**ALL, init=init, muon_wd=0.0, adam_wd=0.0)
    )  # weight decay alone shall not count
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    loader = train_gpt.Loader(trainer.cfg, trainer.run, trainer.split)
    for _ in range(2):
        trainer.step(loader.next(trainer.cfg.train_seq_len), StepPlan(1.0, 0.9))
    loader.close()
    assert [
        name for name, p in trainer.model.named_parameters() if torch.equal(p, before[name])
    ] == []


# ── the flat gradient ──
@pytest.mark.parametrize("grad_accum_steps", (1, 3, 8))
def test_the_flat_buffer_holds_every_gradient_and_the_loss(tiny, grad_accum_steps):
    trainer = make_trainer(tiny(**ALL, grad_accum_steps=grad_accum_steps, grad_clip_norm=0.0))
    optimiser, params = trainer.optimiser, list(trainer.model.parameters())
    optimiser.step, places = lambda k: None, {id(p): p.grad.data_ptr() for p in params}
    loader = train_gpt.Loader(trainer.cfg, trainer.run, trainer.split)
    batch = loader.next(trainer.cfg.train_seq_len)
    loader.close()
    for _ in range(2):  # the second step must start from zero
        trainer.step(batch, StepPlan(1.0, 0.9))
    loss, flat = trainer.model(*batch).mean(), trainer.flat.gradients
    for p, gradient in zip(params, torch.autograd.grad(loss, params), strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-7)
        assert (
            p.grad.data_ptr() == places[id(p)]
            and p.grad.untyped_storage().data_ptr() == flat.data_ptr()
        )
    ends = [loss.item(), flat[:-16].norm().item(), *[0.0] * 14]
    assert flat[-16:].tolist() == pytest.approx(ends, rel=1e-6)
    assert sum(p.numel() for p in params) < len(flat) <= sum(p.numel() + 15 for p in params) + 16
    norms = torch.stack([p.grad.norm() for p in params])
    # nothing else is in it
    assert flat[:-16].norm().item() == pytest.approx(norms.norm().item(), rel=1e-5)


@pytest.mark.parametrize("clip", (0.0, 0.01, 0.3, 1e9))
def test_the_clip_is_that_of_torch(clip):
    params, copies = (
        [train_gpt.parameter(torch.zeros(n), train_gpt.CONTROL) for n in (3, 5, 1)]
        for _ in range(2)
    )
    flat = FlatParameters(dict(zip("abc", params, strict=True)), ALONE)
    flat.loss.fill_(7.0)
    flat.refused.fill_(1)
    for i, (p, copy) in enumerate(zip(params, copies, strict=True)):
        p.grad.copy_(normal(*p.shape, seed=i))
        copy.grad = p.grad.clone()
    norm = torch.nn.utils.clip_grad_norm_(copies, clip or math.inf)
    flat.reduce(clip)
    assert flat.outcome() == pytest.approx((7.0, norm.item(), 0.0, 1.0, 0.0))
    for p, copy in zip(params, copies, strict=True):
        torch.testing.assert_close(p.grad, copy.grad)


class NoHostSync(TorchDispatchMode):
    """Reading a number from a tensor is an error: on a GPU the host would wait for it.

    On a CPU most of what reads one is not dispatched, so that it is asked for by name.
    """

    READS = ("tolist", "item", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__")

    def __enter__(self):
        self.patch = pytest.MonkeyPatch()
        for name in self.READS:
            self.patch.setattr(torch.Tensor, name, self.refuse, raising=False)
        return super().__enter__()

    def __exit__(self, *error):
        self.patch.undo()
        return super().__exit__(*error)

    @staticmethod
    def refuse(*_, **__):
        raise AssertionError("a host sync")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            self.refuse()
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("read", ("tolist", "item", "cpu", "numpy", "__bool__", "__float__"))
def test_what_would_wait_for_a_gpu_is_seen(read):
    with NoHostSync(), pytest.raises(AssertionError, match="a host sync"):
        getattr(torch.ones(()), read)()


def filled_optimiser(cfg) -> Optimiser:
    """Of matrices and a vector, after one step."""
    flat = FlatParameters(matrices(*SHAPES) | other_parameter(), ALONE)
    optimiser = Optimiser(flat, cfg, ALONE)
    flat.proper_gradients.copy_(normal(len(flat.proper_gradients)))
    flat.reduce(cfg.grad_clip_norm)
    optimiser.step(StepPlan(1.0, 0.9))
    return optimiser


def everything_of(optimiser: Optimiser) -> list[torch.Tensor]:
    """Copies of weights, moments and AdamW's steps."""
    buffers = [optimiser.flat.weights, optimiser.first_moments, optimiser.second_moments]
    steps = [state["step"] for state in optimiser.adamw.state.values()]
    return [tensor.clone() for tensor in (*buffers, *steps)]


@pytest.mark.parametrize("clip", (0.0, 0.3))
@pytest.mark.parametrize("what", ("a matrix", "a vector", "the loss", "too large", "no rows"))
def test_a_step_that_must_not_count_changes_no_bit_and_nobody_waits_to_know_it(what, clip):
    optimiser = filled_optimiser(train_gpt.Config(grad_clip_norm=clip, adam_wd=0.1))
    flat = optimiser.flat
    before = everything_of(optimiser)
    views = flat.views(flat.gradients)
    {
        "a matrix": lambda: views["w5"][1].fill_(math.nan),
        "a vector": lambda: views["b"].fill_(math.inf),
        "the loss": lambda: flat.loss.fill_(math.nan),
        "too large": lambda: views["w0"].fill_(1e30),  # its square is infinite
        "no rows": lambda: flat.refused.fill_(1),
    }[what]()
    with NoHostSync():
        flat.reduce(clip)
        optimiser.step(StepPlan(1.0, 0.9))
    assert all(map(torch.equal, everything_of(optimiser), before))
    # and the next one counts again
    flat.gradients.zero_()
    flat.reduce(clip)
    optimiser.step(StepPlan(1.0, 0.9))
    assert not any(map(torch.equal, everything_of(optimiser), before))


def test_a_step_asks_for_its_outcome_when_the_update_is_under_way(tiny, monkeypatch):
    trainer = make_trainer(tiny())
    order = []
    for owner, name in ((trainer.optimiser, "step"), (trainer.flat, "outcome")):
        work = getattr(owner, name)
        noted = functools.partial(lambda name, work, *a: order.append(name) or work(*a), name, work)
        monkeypatch.setattr(owner, name, noted)
    loader = train_gpt.Loader(trainer.cfg, trainer.run, trainer.split)
    trainer.step(loader.next(trainer.cfg.train_seq_len), StepPlan(1.0, 0.9))
    loader.close()
    assert order == ["step", "outcome"]


@pytest.mark.parametrize("world", (1, 2, 3, 8))
def test_the_flat_buffers_hold_every_tensor_once_aligned_and_in_equal_chunks(tiny, world):
    """Shapes and sizes that divide by nothing; the values of the parameters stay what they were."""
    cfg = tiny(**ALL | dict(model_dim=36, mlp_mult=1.3, num_heads=2, num_kv_heads=1, rope_dims=6))
    model = build_model(cfg, Run(cfg), sdpa)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    flat = FlatParameters(
        dict(model.named_parameters()), SimpleNamespace(world=world, rank=world - 1, device="cpu")
    )
    owner = torch.zeros(len(flat.weights), dtype=torch.int64)
    for i, (name, place) in enumerate(flat.places.items(), 1):
        assert place % 16 == 0 and not owner[place : place + before[name].numel()].any()
        owner[place : place + before[name].numel()] = i
    assert (owner > 0).sum() == sum(w.numel() for w in before.values()) and not flat.weights[
        owner == 0
    ].any()
    for name, p in model.named_parameters():
        assert (
            torch.equal(p, before[name])
            and p.data_ptr() == flat.weights[flat.places[name] :].data_ptr()
        )
        assert p.grad.data_ptr() == flat.gradients[flat.places[name] :].data_ptr()
    assert {
        flat.groups[p.role.optimiser].start
        <= flat.places[name]
        < flat.groups[p.role.optimiser].stop
        for name, p in model.named_parameters()
    } == {True} and len(flat.banks) == 5
    # A bank: its matrices in order, then zeros
    for bank, share, weights, gradients in zip(
        flat.banks,
        flat.shares(flat.weights),
        flat.matrices(flat.weights),
        flat.matrices(flat.gradients),
        strict=True,
    ):
        slots, own, gradient = weights.flatten(0, 1), share[-1], gradients[-1]
        filled = len(bank.names)
        for name, slot in zip(bank.names, slots[:filled], strict=True):
            assert torch.equal(slot, before[name])
        assert len(slots) - filled < world and not slots[filled:].any()
        assert (
            own.data_ptr() == weights[-1].data_ptr()
            and own.is_contiguous()
            and gradient.shape == weights[-1].shape
        )
        model.get_parameter(bank.names[0]).grad.fill_(7.0)
        assert (gradient[0] == 7.0).all() or world > 1


# ── Muon ──
FIVE = train_gpt.COEFFICIENTS["quintic"] * 5


def spec_orthogonalise(g: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """One matrix, fp64."""
    x = g.double() / (g.double().norm() + 1e-7)
    x = x.T if g.shape[0] > g.shape[1] else x
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x - 4.7750 * a @ x + 2.0315 * a @ a @ x
    return x.T if g.shape[0] > g.shape[1] else x


def test_muon_is_the_reference_of_every_matrix_of_the_model(tiny):
    """Decay first and decoupled, then the scaled update, at the step's rate and momentum."""
    cfg = tiny(**ALL, muon_wd=0.25, matrix_lr=0.1)
    model = build_model(cfg, Run(cfg), sdpa)
    optimiser = Optimiser(flat := FlatParameters(dict(model.named_parameters()), ALONE), cfg, ALONE)
    matrices = {name: p for name, p in model.named_parameters() if p.role.optimiser == "muon"}
    expected = {name: p.detach().double() for name, p in matrices.items()}
    buffers = dict.fromkeys(matrices, 0.0)
    plans = [StepPlan(1.0, 0.5), StepPlan(0.7, 0.8), StepPlan(0.4, 0.95)]
    for step, k in enumerate(plan._replace(wd_scale=2.0) for plan in plans):
        flat.gradients.copy_(normal(len(flat.gradients), seed=step))
        for name, p in matrices.items():
            g, lr = p.grad.double(), 0.1 * k.lr_scale
            buffers[name] = k.momentum * buffers[name] + g
            update = spec_orthogonalise(g + k.momentum * buffers[name])
            expected[name] = (
                expected[name] * (1 - lr * 0.5)
                - lr * max(1, p.shape[0] / p.shape[1]) ** 0.5 * update
            )
        optimiser.step(k)
    assert len(matrices) == 19
    for name, p in matrices.items():
        torch.testing.assert_close(p.double(), expected[name], rtol=0, atol=2e-5, msg=name)


@pytest.mark.parametrize("coeffs, steps", [("quintic", 5), ("quintic", 3), ("polar_express", 1)])
@pytest.mark.parametrize("shape", ((32, 32), (96, 32), (16, 64)), ids=str)
def test_muon_agrees_with_torch(shape, coeffs, steps):
    """torch.optim.Muon works in bf16: 3 digits, five matrix steps; 2 % of the update.

    It has one triple for all steps.
    """
    (ours,), theirs = matrices(shape).values(), torch.nn.Parameter(normal(*shape))
    optimiser = Optimiser(
        flat := FlatParameters({"w": ours} | other_parameter(), ALONE),
        train_gpt.Config(matrix_lr=0.05, muon_wd=0.1, muon_coeffs=coeffs, muon_backend_steps=steps),
        ALONE,
    )
    triple = train_gpt.COEFFICIENTS[coeffs][0]
    settings = dict(lr=0.05, momentum=0.9, weight_decay=0.1)
    other = torch.optim.Muon([theirs], ns_coefficients=triple, ns_steps=steps, **settings)
    for step in range(4):
        ours.grad.copy_(normal(*shape, seed=step + 1))
        theirs.grad = ours.grad.clone()
        with torch.no_grad():
            flat.gather(optimiser.muon(StepPlan(1.0, 0.9)))
        other.step()
    moved = (theirs - normal(*shape)).norm()
    assert (ours - theirs).norm() < 0.02 * moved


def test_a_batch_of_matrices_is_orthogonalised_one_by_one():
    stack = normal(7, 12, 20) * torch.logspace(-6, 3, 7)[:, None, None]
    for g in (stack, stack.mT):
        together = newton_schulz(g, FIVE)
        for one, matrix in zip(together, g, strict=True):
            torch.testing.assert_close(
                one, newton_schulz(matrix[None], FIVE)[0], rtol=1e-5, atol=1e-5
            )
            torch.testing.assert_close(
                one.double(), spec_orthogonalise(matrix), rtol=1e-3, atol=1e-3
            )


@pytest.mark.parametrize("shape", ((24, 24), (8, 40), (40, 8)), ids=str)
def test_orthogonalise_brings_every_singular_value_near_one_and_keeps_the_directions(shape):
    u, _, v = torch.linalg.svd(normal(*shape), full_matrices=False)
    values = torch.logspace(0, -1.5, len(v))
    turned = u.T @ newton_schulz((u * values @ v)[None], FIVE)[0] @ v.T
    assert turned.diagonal().min() > 0.65 and turned.diagonal().max() < 1.25
    assert (turned - turned.diagonal().diag()).abs().max() < 1e-3


@pytest.mark.parametrize("row_normalise", (False, True))
def test_a_zero_gradient_moves_nothing(row_normalise):
    assert not newton_schulz(torch.zeros(2, 4, 6), FIVE, row_normalise).any()


@pytest.mark.parametrize("shape", ((24, 24), (8, 40), (40, 8)), ids=str)
def test_with_rows_normalised_the_scale_of_a_row_of_the_gradient_changes_nothing(shape):
    """Rows of the weight, in tall matrices too; a row of zeros is 0 / 1e-7, not 0 / 0."""
    g = normal(2, *shape)
    scaled = g * torch.logspace(-3, 2, shape[0])[:, None]
    g[:, 3] = scaled[:, 3] = 0.0
    once, again = (newton_schulz(x, FIVE, row_normalise=True) for x in (g, scaled))
    torch.testing.assert_close(again, once, rtol=1e-4, atol=1e-5)
    assert once.isfinite().all() and not once[:, 3].any()
    plain, plain_scaled = (newton_schulz(x, FIVE) for x in (g, scaled))
    assert (plain - plain_scaled).norm() > 0.3 * plain.norm()


def test_five_polar_express_steps_come_nearer_to_orthogonal_than_five_quintic_ones():
    values = torch.logspace(0, -2, 24).diag()[None]
    far = {}
    for name in train_gpt.COEFFICIENTS:
        cfg = train_gpt.Config(muon_coeffs=name)
        flat = FlatParameters(matrices((24, 24)) | other_parameter(), ALONE)
        x = Optimiser(flat, cfg, ALONE).orthogonalise(values)
        far[name] = (torch.linalg.svdvals(x) - 1).abs().max().item()
    assert far["polar_express"] < 0.15 < far["quintic"]


def test_polar_express_has_coefficients_for_five_steps():
    train_gpt.Config(muon_coeffs="polar_express", muon_backend_steps=5)
    train_gpt.Config(muon_coeffs="quintic", muon_backend_steps=6)
    message = "MUON_BACKEND_STEPS=6: MUON_COEFFS=polar_express has coefficients for 5"
    with pytest.raises(train_gpt.Refusal, match=message):
        train_gpt.Config(muon_coeffs="polar_express", muon_backend_steps=6)


def test_the_momentum_warms_up_linearly_and_reaches_the_buffer(tiny):
    cfg = tiny(
        muon_momentum_warmup_start=0.8,
        muon_momentum=0.9,
        muon_momentum_warmup_steps=10,
        iterations=40,
    )
    momentum = [Schedule(cfg).at(step, 0.0).momentum for step in (0, 1, 5, 10, 39)]
    assert momentum == pytest.approx([0.8, 0.81, 0.85, 0.9, 0.9])
    trainer, buffers = make_trainer(cfg), []
    loader = train_gpt.Loader(cfg, trainer.run, trainer.split)
    for step in range(2):
        trainer.step(loader.next(cfg.train_seq_len), Schedule(cfg).at(step, 0.0))
        buffers.append(trainer.optimiser.shares[0].momenta.clone())
    loader.close()
    gradients = trainer.optimiser.shares[0].gradients
    torch.testing.assert_close(buffers[1], 0.81 * buffers[0] + gradients)


# ── AdamW ──
def test_adamw_is_that_of_torch_on_separate_tensors(tiny):
    cfg = tiny(**ALL, adam_wd=0.3, beta1=0.8, beta2=0.9, adam_eps=1e-6)
    model = build_model(cfg, Run(cfg), sdpa)
    optimiser = Optimiser(flat := FlatParameters(dict(model.named_parameters()), ALONE), cfg, ALONE)
    rates = {
        "embed": dict(lr=0.03, betas=(0.8, 0.9)),
        "scalar": dict(lr=0.02, betas=(0.8, 0.9)),
        "smear": dict(lr=0.02, betas=(0.8, 0.99)),
    }
    pairs = [
        (
            name,
            p,
            copy := torch.nn.Parameter(p.detach().clone()),
            torch.optim.AdamW(
                [copy],
                **rates[p.role.optimiser],
                eps=1e-6,
                weight_decay=0.3,
                foreach=False,
                fused=False,
            ),
        )
        for name, p in model.named_parameters()
        if p.role.optimiser != "muon"
    ]
    for step, scale in enumerate((1.0, 1.0, 0.25)):
        flat.gradients.copy_(normal(len(flat.gradients), seed=step))
        for _, p, copy, other in pairs:
            copy.grad = p.grad.clone()
            other.param_groups[0]["lr"] = rates[p.role.optimiser]["lr"] * scale
            other.step()
        optimiser.step(StepPlan(scale, 0.9))
    assert len(pairs) > 20
    for name, p, copy, _ in pairs:
        torch.testing.assert_close(p, copy, rtol=1e-5, atol=1e-6, msg=name)
