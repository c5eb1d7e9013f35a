"""The low-rank correction of what rounding took away, and its parts in a file.

Would have caught: a step that fp16 rounds to zero (0 / 0 in a group of zeros, as #1855 has it),
factors of a file that do not fit its codes, and a correction that is made and not added.
"""

import base64
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_gptq import golden_case

import train_gpt
from train_gpt import (
    Config,
    Grid,
    are_parts,
    correction,
    encode_artifact,
    main,
    quantised,
    read_artifact,
    read_parts,
    refit_correction,
    restored,
    shipped_state,
    svd_correction,
    truncated_svd,
    uneven_codes,
)

GOLDEN = json.loads((Path(__file__).parent / "golden" / "gptq.json").read_text())


# ── #1855's own numbers ───────────────────────────────────────────────────────────────────────────
def golden_error(name: str, sigmas: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, columns) fp32, the weights of this case minus what its GPTQ made of them, and its
    Hessian (columns, columns)."""
    (case,) = [c for c in GOLDEN["cases"] if (c["name"], c["clip_sigmas"]) == (name, sigmas)]
    w, hessian = golden_case(case, torch.float32)
    codes = np.frombuffer(base64.b64decode(case["codes_fp64"]), np.int8).reshape(case["shape"])
    scale = np.array(case["scales_fp16_bits"], np.uint16).view(np.float16)[:, None]
    return w[0] - torch.from_numpy(codes * scale.astype(np.float32)), hessian[0]


@pytest.mark.parametrize("case", GOLDEN["lqer"], ids=lambda c: f"{c['case']}-{c['rank']}")
def test_the_factors_are_packed_as_1855_packs_them(case, monkeypatch):
    error, H = golden_error(case["case"], case["clip_sigmas"])
    rank = case["rank"]
    left, right = truncated_svd(error, rank)
    A = torch.tensor(case["A"]).view(-1, rank)
    B = torch.tensor(case["B"]).view(rank, -1)
    assert torch.allclose(left, A, atol=1e-5) and torch.allclose(right, B, atol=1e-5)

    monkeypatch.setattr(train_gpt, "truncated_svd", lambda *_: (A, B))
    cfg = Config(lqer_enabled=True, lqer_rank=rank, lqer_asym_group=case["group"])
    parts = svd_correction(cfg, error)
    assert parts["left"].flatten().tolist() == case["A_codes"]
    assert parts["right"].flatten().tolist() == case["B_codes"]
    for name, bits in (("left_scale", "A_scale_fp16_bits"), ("right_scale", "B_scale_fp16_bits")):
        assert parts[name].view(torch.int16).flatten().tolist() == case[bits]

    weighted = [torch.trace(e @ H @ e.T).item() for e in (error, error - correction(parts))]
    wanted = [case["weighted_error_before"], case["weighted_error_after"]]
    assert weighted == pytest.approx(wanted, rel=1e-4)
    norms = [e.norm().item() for e in (error, error - correction(parts), error - A @ B)]
    wanted = ("error_norm_before", "error_norm_after", "error_norm_after_exact_rank")
    assert norms == pytest.approx([case[key] for key in wanted], rel=1e-5)


def test_a_group_of_zeros_is_zeros():
    codes, step = uneven_codes(torch.tensor([[0.0, 0.0], [-3.5, 3.5]]), 3)
    assert codes.tolist() == [[0, 0], [-4, 3]] and step.flatten()[1] == 1 and (step > 0).all()
    cfg = Config(lqer_enabled=True, lqer_rank=2, lqer_asym_group=8)
    zeros = torch.zeros(6, 8)
    refits = [refit_correction(cfg, zeros, h) for h in (torch.eye(8), torch.zeros(8, 8))]
    for parts in (svd_correction(cfg, zeros), *refits):
        assert torch.equal(correction(parts), zeros)
    of_no_inputs = refit_correction(cfg, torch.randn(6, 8), torch.zeros(8, 8))
    assert correction(of_no_inputs).isfinite().all()


def test_the_size_of_a_hessian_changes_no_code():
    """Steps would end near the least of fp16. A power of 4: nothing is rounded otherwise."""
    error, hessian = golden_error("small", 12.85)
    # an input that is always 0 counts as 1, whatever the others are
    hessian = hessian + 0.1 * torch.eye(len(hessian))
    cfg = Config(lqer_enabled=True, lqer_asym_group=12)
    parts, again = (refit_correction(cfg, error, size * hessian) for size in (1.0, 4.0**13))
    assert all(torch.equal(t, again[part]) for part, t in parts.items())


def test_refitted_factors_leave_less_of_the_error_that_counts_than_those_of_the_svd():
    """#1855's own errors and Hessians, at the same rank."""
    for name, sigmas in (("small", 12.85), ("large", 12.85), ("large", 2.5)):
        error, hessian = golden_error(name, sigmas)
        cfg = Config(lqer_enabled=True, lqer_asym_group=12)
        left = {
            how: error - correction(parts)
            for how, parts in dict(
                svd=svd_correction(cfg, error),
                plain=refit_correction(cfg, error, None),
                weighted=refit_correction(cfg, error, hessian),
            ).items()
        }
        size = {how: e.norm().item() for how, e in left.items()}
        weighted = {how: torch.trace(e @ hessian @ e.T).item() for how, e in left.items()}
        assert size["plain"] < size["svd"] < error.norm()
        assert weighted["weighted"] < min(weighted["plain"], weighted["svd"])


# ── In an artifact ────────────────────────────────────────────────────────────────────────────────
def state_and_plan() -> tuple[dict, dict]:
    """Four matrices and a float; rounding costs b most, then c."""
    normal = torch.Generator().manual_seed(0)
    sizes = dict(a=1.0, b=9.0, c=3.0, d=0.5)
    state = {name: s * torch.randn(24, 32, generator=normal) for name, s in sizes.items()}
    plan = dict.fromkeys(state, Grid(4)) | {"gain": torch.float16}
    return state | {"gain": torch.ones(5)}, plan


PACKINGS = {
    "asymmetric": dict(lqer_asym_group=16),
    "by rows": dict(lqer_asym_enabled=False),
    "no such groups": dict(lqer_asym_group=7),
    "refit": dict(lqer_fit="refit"),
}


@pytest.mark.parametrize("packing", PACKINGS)
def test_the_worst_matrices_are_corrected_and_read_back_to_the_bit(tmp_path, packing):
    state, plan = state_and_plan()
    cfg = Config(lqer_enabled=True, lqer_top_k=2, lqer_rank=3, **PACKINGS[packing])
    plain = quantised(Config(), state, plan)
    parts = quantised(cfg, state, plan)
    assert {name for name in parts if "left" in parts[name]} == {"b", "c"}
    for name, tensor in parts.items():
        assert are_parts(tensor)
        for part, t in plain[name].items():
            assert torch.equal(tensor[part], t)
        on = (restored(tensor) - state[name]).norm()
        off = (restored(plain[name]) - state[name]).norm()
        assert on < off if name in "bc" else on == off

    path = tmp_path / "artifact.bin"
    path.write_bytes(encode_artifact(cfg, parts))
    _, read = read_artifact(path)
    for name, w in shipped_state(parts).items():
        assert torch.equal(read[name], w)


def test_a_correction_has_no_more_rank_than_its_matrix():
    state, plan = state_and_plan()
    parts = quantised(Config(lqer_enabled=True, lqer_rank=64), state, plan)
    assert parts["b"]["left"].shape == (24, 24) and are_parts(parts["b"])


def test_a_run_says_what_the_correction_did_and_took(tiny, monkeypatch):
    weighted = []

    def spy(cfg, error, hessian):
        weighted.append(hessian is not None)
        return refit_correction(cfg, error, hessian)

    monkeypatch.setattr(train_gpt, "refit_correction", spy)
    knobs = dict(gptq_enabled=True, gptq_calibration_batches=1, quant_bits_mlp=4, iterations=3)
    cfg = tiny(lqer_enabled=True, lqer_fit="refit", **knobs)
    report = main(cfg)
    # the export; GPTQ is proved against weights without
    assert weighted[: cfg.lqer_top_k] == [True] * 3
    row = report["toggles"]["LQER"]
    assert row["active"] and row["tensors"] == 3 and row["bytes_saved"] < 0
    what, share, unit = row["scope"].split(" ", 2)
    assert (what, unit) == ("export,", "x the squared error") and 0 < float(share) < 1
    _, parts = read_parts(Path(report["artifact_path"]))
    assert row["params"] == sum(t["codes"].numel() for t in parts.values() if "left" in t)


HALF = torch.float16
DAMAGE = dict(
    left=torch.zeros(23, 3, dtype=torch.int8),
    right=torch.zeros(3, 31, dtype=torch.int8),
    left_scale=torch.ones(24, 3, dtype=HALF),
    right_scale=torch.ones(7, 1, dtype=HALF),
    codes=torch.zeros(24, 31, dtype=torch.int8),
    scale=torch.ones(24, 2, dtype=HALF),
)
ODD = [
    *DAMAGE.items(),
    ("left", torch.zeros(72, dtype=torch.int8)),
    ("left", torch.zeros(24, 0, dtype=torch.int8)),
    ("left", torch.zeros(24, 3)),
    ("right", None),
    ("right_scale", torch.ones(0, 1, dtype=HALF)),
    ("right_scale", torch.ones(6, dtype=HALF)),
    ("more", torch.ones(6, dtype=HALF)),
]


@pytest.mark.parametrize("part, tensor", ODD, ids=lambda x: x if isinstance(x, str) else "")
def test_factors_that_do_not_fit_are_none_of_ours(part, tensor):
    state, plan = state_and_plan()
    parts = quantised(Config(lqer_enabled=True, lqer_rank=3, lqer_asym_group=16), state, plan)["b"]
    assert are_parts(parts)
    changed = parts | {part: tensor}
    if tensor is None:
        del changed[part]
    assert not are_parts(changed)
