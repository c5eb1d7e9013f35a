"""The one quantisation grid, for every bits x clip x codes x floor.

Would have caught: #975's three grids (fake-quant, noise and export each had their own), #194's
fake-quant with an fp32 scale where the export ships fp16, a clip search that picks one clip for a
whole stack instead of one per matrix, a scale that fp16 rounds to zero (0 / 0 in a zero row), and
a floor that is missing, or there when it is off (#989).
"""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from train_gpt import CLIP_QUANTILES, Grid, row_quantile

GRIDS = [
    Grid(*g) for g in itertools.product(range(2, 9), CLIP_QUANTILES, ("sym", "asym"), (False, True))
]
GRIDS += [
    Grid(bits, "sigma", codes, sigmas=2.5) for bits in range(2, 9) for codes in ("sym", "asym")
]
every_grid = pytest.mark.parametrize(
    "grid", GRIDS, ids=lambda g: f"{g.bits}{g.clip}-{g.codes}-{'floor' * g.floor}"
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def w() -> torch.Tensor:
    """(8, 192): rows of very different size, one of zeros, one constant, one with an outlier."""
    w = normal(8, 192) * torch.tensor([1e-7, 1e-3, 0.02, 0.3, 3.0, 0.0, 0.0, 0.2])[:, None]
    w[6], w[7, 11] = 0.7, -9.0
    return w


# ── the row quantile ──
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 400),
    seed=st.integers(0, 999),
    q=st.floats(0, 1) | st.sampled_from(sorted({q for qs in CLIP_QUANTILES.values() for q in qs})),
)
def test_row_quantile_is_torch_quantile(rows, columns, q, seed):
    magnitude = normal(rows, columns, seed=seed).abs()
    before = magnitude.clone()
    exact = torch.quantile(magnitude.double(), q, -1, keepdim=True)
    torch.testing.assert_close(row_quantile(magnitude, q).double(), exact, rtol=1e-6, atol=1e-6)
    assert torch.equal(magnitude, before)


def test_row_quantile_of_a_stack_is_that_of_each_row():
    magnitude = normal(2, 3, 50).abs()
    rows = [row_quantile(row, 0.999) for matrix in magnitude for row in matrix]
    assert torch.equal(row_quantile(magnitude, 0.999).flatten(), torch.cat(rows))


# ── codes and scales ──
@every_grid
def test_snap_is_what_a_reader_makes_of_the_shipped_bytes(grid, w):
    codes, scale = (part.numpy() for part in grid.quantise(w))
    assert (codes.dtype, scale.dtype, codes.shape, scale.shape) == (
        np.int8,
        np.float16,
        (8, 192),
        (8, 1),
    )
    assert np.array_equal(grid.fake_quantise(w).numpy(), codes.astype("f4") * scale.astype("f4"))
    assert torch.equal(grid.fake_quantise(w), grid.dequantise(*grid.quantise(w)))
    in_place = w.clone()
    grid.snap(in_place)
    assert torch.equal(in_place, grid.fake_quantise(w))


@every_grid
def test_the_step_that_rounds_is_the_fp16_step_that_ships(grid, w):
    scale = grid.scale(w)
    assert scale.dtype == torch.float32 and torch.equal(scale, grid.quantise(w)[1].float())
    assert torch.equal(grid.quantise(w)[0].float(), grid.levels(w, scale))


@every_grid
def test_codes_stay_in_range(grid, w):
    codes, top = grid.quantise(w)[0], 2 ** (grid.bits - 1) - 1
    assert codes.max() == top and codes.min() >= -top - (grid.codes == "asym")


def test_asym_uses_its_extra_code_where_the_clip_cuts():
    w = normal(4, 3000)
    w[:, 0] = -6.0
    lowest = {
        codes: int(Grid(4, "search5", codes).quantise(w)[0].min()) for codes in ("sym", "asym")
    }
    assert lowest == {"sym": -7, "asym": -8}


@every_grid
def test_no_weight_inside_the_clip_moves_more_than_half_a_step_and_others_go_to_the_edge(grid, w):
    snapped, scale = grid.fake_quantise(w), grid.scale(w)
    low, high = -(grid.top + (grid.codes == "asym")) * scale, grid.top * scale
    inside = (w >= low) & (w <= high)
    assert ((snapped - w).abs() <= scale / 2 + 1e-6 * w.abs())[inside].all()
    edge = torch.where(w > 0, high, low)
    assert torch.equal(snapped[~inside], edge[~inside])
    assert inside.float().mean() > 0.8


@every_grid
def test_a_zero_row_gives_zeros_and_a_usable_step(grid, w):
    codes, scale = grid.quantise(w)
    assert not codes[5].any() and not grid.fake_quantise(w)[5].any() and 0 < scale[5] < 1.1


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("clip", CLIP_QUANTILES)
def test_the_floor_binds_exactly_for_rows_below_one(bits, clip):
    # Constant rows: the clip is the row
    w = torch.tensor([0.01, 0.5, 0.999, 1.5, 40.0])[:, None].repeat(1, 64)
    free = Grid(bits, clip).scale(w).flatten()
    floored = Grid(bits, clip, floor=True).scale(w).flatten()
    assert torch.equal(floored[:3], torch.full((3,), 1 / (2 ** (bits - 1) - 1)).half().float())
    assert (free[:3] < floored[:3]).all() and torch.equal(free[3:], floored[3:])


# ── stacks ──
@every_grid
def test_a_stack_gives_what_each_matrix_gives(grid, w):
    stack = torch.stack((w, w.flip(0) * 3, w.roll(1, 1) * 0.1))
    codes, scales = zip(*map(grid.quantise, stack), strict=True)
    for together, one_by_one in zip(grid.quantise(stack), (codes, scales), strict=True):
        assert torch.equal(together, torch.stack(one_by_one))
    assert torch.equal(
        grid.fake_quantise(stack), torch.stack([grid.fake_quantise(m) for m in stack])
    )


@pytest.mark.parametrize("floor", (False, True))
def test_search_takes_the_best_clip_of_each_matrix(floor):
    stack = 3 * normal(5, 4, 1500)
    stack[1, :, :3] *= 30  # outliers that are worth their range, unlike those of matrix 2
    stack[2, :, 0] = 40.0
    stack[3] = stack[3].sign()
    grid, chosen = Grid(4, "search5", "sym", floor), set()
    exported = grid.fake_quantise(stack).double().numpy()
    for matrix, found in zip(stack.double().numpy(), exported, strict=True):
        errors = []
        for q in CLIP_QUANTILES["search5"]:
            step = (
                np.maximum(np.quantile(abs(matrix), q, -1, keepdims=True) / 7, floor / 7)
                .astype("f2")
                .astype("f8")
            )
            errors.append(((np.clip(np.round(matrix / step), -7, 7) * step - matrix) ** 2).sum())
        assert ((found - matrix) ** 2).sum() == pytest.approx(min(errors), rel=1e-6)
        chosen.add(int(np.argmin(errors)))
    assert len(chosen) > 1  # the matrices do differ in their best clip


# ── doing it twice: the same again where nothing is clipped (else the second pass may cut more) ──
def assert_idempotent(grid: Grid, w: torch.Tensor) -> None:
    once = grid.fake_quantise(w)
    assert once.any() and not torch.equal(once, w) and torch.equal(grid.fake_quantise(once), once)


@pytest.mark.parametrize("grid", [g for g in GRIDS if g.clip == "amax"], ids=str)
def test_amax_is_idempotent(grid, w):
    assert_idempotent(grid, w)


@pytest.mark.parametrize("grid", [g for g in GRIDS if g.floor], ids=str)
def test_every_clip_is_idempotent_where_the_floor_sets_the_step(grid, w):
    assert_idempotent(grid, w[w.abs().amax(1) < 1])


@pytest.mark.parametrize(
    "grid", [g for g in GRIDS if g.clip == "quantile" and not g.floor], ids=str
)
def test_quantile_is_idempotent_up_to_128_columns(grid, w):
    # There its cut is below fp16's rounding
    assert_idempotent(grid, w[:, :128])


def test_amax_reaches_the_top_code_in_every_row():
    for bits, codes in itertools.product(range(2, 9), ("sym", "asym")):
        reached = Grid(bits, "amax", codes).quantise(normal(64, 33))[0].abs().amax(1)
        assert (reached == 2 ** (bits - 1) - 1).all()


# ── the seeds' formulas, written again in numpy ──
def rounded(w: np.ndarray, step: np.ndarray, low: int, high: int) -> np.ndarray:
    step = step.astype("f2").astype("f4")
    return np.clip(np.round(w / step), low, high) * step


@pytest.mark.parametrize("bits", (5, 6, 8))
def test_quantile_clip_is_the_int8_export_of_145_199_and_194(bits, w):
    c, w = 2 ** (bits - 1) - 1, w.numpy()
    clip = np.quantile(abs(w), 0.9999984, axis=1, keepdims=True)
    reference = rounded(np.clip(w, -clip, clip).astype("f4"), np.maximum(clip / c, 1 / c), -c, c)
    assert np.array_equal(
        Grid(bits, "quantile", "sym", True).fake_quantise(torch.from_numpy(w)).numpy(), reference
    )


@pytest.mark.parametrize("bits", (5, 6))
def test_amax_asym_without_floor_is_the_export_of_989(bits, w):
    c, w = 2 ** (bits - 1) - 1, w.numpy()
    step = np.maximum(abs(w).max(1, keepdims=True) / np.float32(c), np.finfo("f2").tiny)
    assert np.array_equal(
        Grid(bits, "amax", "asym").fake_quantise(torch.from_numpy(w)).numpy(),
        rounded(w, step, -c - 1, c),
    )


def test_search5_is_the_export_of_975():
    w = (2 * normal(6, 2000)).numpy()
    w[2, 5] = 60
    clips = [
        np.quantile(abs(w), q, axis=1, keepdims=True) for q in (0.999, 0.9995, 0.9999, 0.99999, 1)
    ]
    candidates = [rounded(w, np.maximum(clip / 31, 1 / 31), -31, 31) for clip in clips]
    best = min(candidates, key=lambda candidate: ((candidate - w) ** 2).mean())
    assert np.array_equal(
        Grid(6, "search5", "sym", True).fake_quantise(torch.from_numpy(w)).numpy(), best
    )
