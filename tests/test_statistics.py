"""The statistics of ablations: scipy's figures where it has them, published numbers elsewhere,
and no overstatement.

Would have caught: SWA judged without QAT alone, where four cells of two seeds show that it turns
from a gain into a loss under QAT; records claimed from one run; runs of other code, data or
machines averaged into one arm.
"""

import copy
import hashlib
import itertools
import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ablation.records import (
    FINGERPRINT,
    check_alike,
    check_arm,
    code_difference,
    differing,
    lookup,
)
from ablation.statistics import (
    Comparison,
    decimal_places,
    detectable,
    factorial,
    holm,
    paired,
    record_rule,
    student,
    summary,
    verdict,
    welch,
)
from ablation.submission import unlike
from train_gpt import Refusal

SEEDS = st.integers(0, 9)
BPB = st.integers(900_000, 1_400_000).map(lambda n: n / 1e6)
ARM = st.dictionaries(SEEDS, BPB, min_size=2, max_size=8)
SWA_QAT = {  # (SWA, QAT): two seeds each, of one published record's ablation
    (1, 0): {1: 1.14335055, 2: 1.14350233},
    (1, 1): {1: 1.14429409, 2: 1.14506387},
    (0, 0): {1: 1.14475420, 2: 1.14497254},
    (0, 1): {1: 1.13968856, 2: 1.14009800},
}
FACTORS = {"SWA": [0, 1], "QAT": [0, 1]}


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def close(*want):
    return pytest.approx(want, rel=1e-9, abs=1e-12)


def arm(*values) -> dict[int, float]:
    return dict(enumerate(values))


def array(values: dict, seeds) -> np.ndarray:
    return np.array([values[seed] for seed in seeds])


def normal_arm(seed: int, n: int, mean: float = 1.1, sd: float = 0.001) -> dict[int, float]:
    return arm(*np.random.default_rng(seed).normal(mean, sd, n))


# ── One arm ───────────────────────────────────────────────────────────────────────────────────────
def test_summary_is_the_mean_and_the_sample_standard_deviation():
    assert summary({7: 1.0, 3: 1.1, 5: 1.5}) == (
        3,
        pytest.approx(1.2),
        pytest.approx(math.sqrt(0.07)),
    )


def test_one_run_has_no_standard_deviation():
    one = summary({7: 1.2})
    assert (one.n, one.mean) == (1, 1.2)
    assert math.isnan(one.sd)


def test_equal_scores_have_a_standard_deviation_of_exactly_zero():
    assert np.std([0.1, 0.1, 0.1], ddof=1) > 0  # what rounding makes of it
    assert summary(arm(0.1, 0.1, 0.1)).sd == 0


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("compare", [paired, welch])
def test_a_score_that_is_not_finite_is_refused_by_its_seed(compare, broken):
    with pytest.raises(Refusal, match=f"seed 1 scored {broken}"):
        compare(arm(1.1, 1.2), arm(1.1, broken))
    with pytest.raises(Refusal, match="no scores"):
        summary({})


# ── Two arms ──────────────────────────────────────────────────────────────────────────────────────
@settings(deadline=None)
@given(ARM, ARM)
def test_paired_is_scipys_ttest_rel_over_the_common_seeds(a, b):
    seeds = sorted(a.keys() & b.keys())
    x, y = array(a, seeds), array(b, seeds)
    if len(seeds) < 2:
        with pytest.raises(Refusal, match="needs 2 in common"):
            paired(a, b)
    elif np.ptp(y - x) > 1e-7:  # else scipy divides by rounding errors
        want, got = stats.ttest_rel(y, x), paired(a, b)
        assert got[:8] == close(
            len(seeds),
            np.mean(y - x),
            np.std(y - x, ddof=1),
            want.statistic,
            want.df,
            want.pvalue,
            *want.confidence_interval(0.95),
        )
    else:
        assert paired(a, b).sd == 0


@settings(deadline=None)
@given(ARM, ARM)
def test_welch_is_scipys_ttest_ind_of_unequal_variance(a, b):
    x, y = array(a, a), array(b, b)
    if np.ptp(x) or np.ptp(y):
        got = welch(a, b)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scipy's, where one arm has no spread
            want = stats.ttest_ind(y, x, equal_var=False)
        assert got.n == (len(x), len(y))
        assert got[1:8] == close(
            y.mean() - x.mean(),
            math.hypot(x.std(ddof=1), y.std(ddof=1)),
            want.statistic,
            want.df,
            want.pvalue,
            *want.confidence_interval(0.95),
        )
    else:
        assert welch(a, b).sd == 0


def test_a_pair_needs_two_common_seeds_and_the_refusal_names_all():
    with pytest.raises(Refusal, match=r"a has the seeds \[1, 2\], b has \[2, 3\], common: \[2\]"):
        paired({1: 1.1, 2: 1.2}, {3: 1.1, 2: 1.2})


@pytest.mark.parametrize(
    "a, b, runs", [(arm(1.1), arm(1.1, 1.2), "1 and 2"), (arm(1.1, 1.2, 1.3), arm(1.1), "3 and 1")]
)
def test_welch_needs_two_runs_of_each(a, b, runs):
    with pytest.raises(Refusal, match=f"{runs} runs"):
        welch(a, b)
    with pytest.raises(Refusal, match=f"{runs} runs"):
        record_rule(a, b, 0.4)


@pytest.mark.parametrize("compare", [paired, welch])
@pytest.mark.parametrize(
    "shift, t, p", [(-0.1, -math.inf, 0.0), (0.1, math.inf, 0.0), (0.0, 0.0, 1.0)]
)
def test_without_any_spread_p_is_zero_or_one_and_the_interval_a_point(compare, shift, t, p):
    got = compare(arm(1.1, 1.1, 1.1), arm(*[1.1 + shift] * 3))
    assert (got.sd, got.t, got.p) == (0, t, p)
    assert got.low == got.mean == got.high == pytest.approx(shift)


def test_the_same_shift_of_every_seed_is_no_spread_though_rounding_says_so():
    a = {1: 0.3, 2: 1.234, 3: 2.3}
    b = {seed: value - 0.1 for seed, value in a.items()}
    assert np.ptp([b[seed] - a[seed] for seed in a]) > 0
    assert (paired(a, b).sd, paired(a, b).p) == (0, 0)


def test_swapping_the_arms_turns_the_sign_and_nothing_else():
    a, b = normal_arm(1, 4), normal_arm(2, 4)
    for compare in (paired, welch):
        there, back = compare(a, b), compare(b, a)
        assert (back.mean, back.t, back.low, back.high) == close(
            -there.mean, -there.t, -there.high, -there.low
        )
        assert (back.sd, back.df, back.p) == close(there.sd, there.df, there.p)


def test_pairing_removes_the_noise_that_both_arms_share():
    a = normal_arm(3, 5, sd=0.01)
    b = {seed: value - 0.001 + 0.0001 * (-1) ** seed for seed, value in a.items()}
    assert paired(a, b).p < 1e-4
    assert welch(a, b).p > 0.5


# ── Factorials ────────────────────────────────────────────────────────────────────────────────────
def test_published_swa_and_qat_cancel_each_other():
    swa_alone = paired(SWA_QAT[0, 0], SWA_QAT[1, 0])
    swa_on_qat = paired(SWA_QAT[0, 1], SWA_QAT[1, 1])
    qat_alone = paired(SWA_QAT[0, 0], SWA_QAT[0, 1])
    qat_on_swa = paired(SWA_QAT[1, 0], SWA_QAT[1, 1])
    simple = [
        round(1e3 * effect.mean, 2) for effect in (swa_alone, swa_on_qat, qat_alone, qat_on_swa)
    ]
    assert simple == [-1.44, 4.79, -4.97, 1.25]
    swa, qat, both = factorial(SWA_QAT, FACTORS)
    assert [row.term for row in (swa, qat, both)] == [
        "SWA 1 - 0",
        "QAT 1 - 0",
        "SWA 1 - 0 x QAT 1 - 0",
    ]
    assert both.mean == pytest.approx(6.2e-3, abs=5e-5)
    assert (swa.mean, qat.mean) == close(
        (swa_alone.mean + swa_on_qat.mean) / 2, (qat_alone.mean + qat_on_swa.mean) / 2
    )
    assert both.mean == pytest.approx(swa_on_qat.mean - swa_alone.mean, rel=1e-9)
    assert (both.n, both.df) == (2, 1)
    assert both.low > 0 > swa_alone.mean


def three_way(seed: int = 0) -> tuple[dict, dict]:
    """A 2 x 3 x 2 factorial of 4 seeds, and its factors."""
    factors = {"QAT": [0, 1], "LR": [0.01, 0.02, 0.04], "EMA": ["off", "on"]}
    cells = {
        cell: normal_arm(seed + k, 4) for k, cell in enumerate(itertools.product(*factors.values()))
    }
    return cells, factors


def test_terms_of_a_factorial_with_three_levels():
    terms = [row.term for row in factorial(*three_way())]
    assert terms == [
        "QAT 1 - 0",
        "LR 0.02 - 0.01",
        "LR 0.04 - 0.01",
        "EMA on - off",
        "QAT 1 - 0 x LR 0.02 - 0.01",
        "QAT 1 - 0 x LR 0.04 - 0.01",
        "QAT 1 - 0 x EMA on - off",
        "LR 0.02 - 0.01 x EMA on - off",
        "LR 0.04 - 0.01 x EMA on - off",
    ]


def test_a_main_effect_is_scipys_paired_test_of_means_per_seed():
    cells, factors = three_way()
    levels = [
        np.mean(
            [array(cells[qat, lr, ema], range(4)) for qat in (0, 1) for ema in ("off", "on")],
            axis=0,
        )
        for lr in (0.01, 0.04)
    ]
    row = next(row for row in factorial(cells, factors) if row.term == "LR 0.04 - 0.01")
    want = stats.ttest_rel(levels[1], levels[0])
    assert (row.n, row.t, row.p, row.low, row.high) == close(
        4, want.statistic, want.pvalue, *want.confidence_interval()
    )


def test_an_interaction_is_scipys_one_sample_test_of_differences_of_differences():
    cells, factors = three_way()
    y = {
        (lr, ema): np.mean([array(cells[qat, lr, ema], range(4)) for qat in (0, 1)], axis=0)
        for lr in (0.01, 0.04)
        for ema in ("off", "on")
    }
    row = next(
        row for row in factorial(cells, factors) if row.term == "LR 0.04 - 0.01 x EMA on - off"
    )
    contrast = (y[0.04, "on"] - y[0.01, "on"]) - (y[0.04, "off"] - y[0.01, "off"])
    want = stats.ttest_1samp(contrast, 0)
    assert (row.mean, row.t, row.p, row.low, row.high) == close(
        contrast.mean(), want.statistic, want.pvalue, *want.confidence_interval()
    )


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(-50, 50), min_size=4, max_size=4), st.integers(-50, 50))
def test_known_effects_come_back_and_seed_noise_cancels(effects, interaction):
    qat, low, high, ema = (effect / 1e4 for effect in effects)
    cells, factors = three_way()
    lr = {0.01: 0.0, 0.02: low, 0.04: high}
    for q, rate, e in cells:
        shift = qat * q + lr[rate] + ema * (e == "on") + interaction / 1e4 * q * (e == "on")
        cells[q, rate, e] = {seed: 1.1 + 0.01 * seed + shift for seed in range(4)}
    rows = {row.term: row for row in factorial(cells, factors)}
    got = [
        rows[term].mean
        for term in (
            "QAT 1 - 0",
            "LR 0.02 - 0.01",
            "LR 0.04 - 0.01",
            "EMA on - off",
            "QAT 1 - 0 x EMA on - off",
            "QAT 1 - 0 x LR 0.02 - 0.01",
        )
    ]
    half = interaction / 2e4  # averaged over the other factor
    assert got == pytest.approx(
        [qat + half, low, high, ema + half, interaction / 1e4, 0], abs=1e-12
    )
    assert all(row.sd == 0 and row.p == (0 if row.mean else 1) for row in rows.values())
    assert (
        rows["QAT 1 - 0 x LR 0.02 - 0.01"].mean == 0
    )  # exactly, though its terms carry rounding errors


def test_a_factorial_uses_the_seeds_common_to_all_cells():
    cells = copy.deepcopy(SWA_QAT)
    cells[0, 0][3] = 9.0
    cells[1, 1][4] = 0.1
    assert factorial(cells, FACTORS) == factorial(SWA_QAT, FACTORS)
    del cells[0, 1][2]
    with pytest.raises(Refusal, match=r"common to all cells are \[1\].*\(0, 1\): \[1\]"):
        factorial(cells, FACTORS)


def test_a_missing_and_a_stray_cell_are_named():
    missing = {cell: values for cell, values in SWA_QAT.items() if cell != (1, 0)}
    with pytest.raises(Refusal, match="SWA=1, QAT=0 is missing"):
        factorial(missing, FACTORS)
    with pytest.raises(Refusal, match="SWA=1, QAT=2 is no combination"):
        factorial({**SWA_QAT, (1, 2): arm(1.1, 1.2)}, FACTORS)


def test_one_factor_is_a_row_of_paired_tests():
    a, b, c = (normal_arm(k, 3) for k in range(3))
    rows = factorial({("x",): a, ("y",): b, ("z",): c}, {"ACT": ["x", "y", "z"]})
    assert rows == [
        paired(a, b)._replace(term="ACT y - x"),
        paired(a, c)._replace(term="ACT z - x"),
    ]


# ── The challenge's rule, and what can be shown ───────────────────────────────────────────────────
def test_the_margin_is_0_005_nats_per_token():
    assert record_rule(normal_arm(1, 3), normal_arm(2, 3), 1 / 2.436).margin == pytest.approx(
        0.00296, abs=5e-6
    )


@pytest.mark.parametrize("gain", [0.0, 0.00296, 0.0045, 0.006])
def test_the_record_rule_is_scipys_one_sided_welch_test_above_the_margin(gain):
    new, old = normal_arm(5, 4, 1.1 - gain, 0.0005), normal_arm(6, 3, 1.1, 0.0008)
    got = record_rule(new, old, 0.41)
    x, y = array(new, new), array(old, old)
    want = stats.ttest_ind(
        y - 0.005 / math.log(2) * 0.41, x, equal_var=False, alternative="greater"
    )
    assert (got.difference, got.t, got.df, got.p) == close(
        y.mean() - x.mean(), want.statistic, want.df, want.pvalue
    )
    assert got.holds is bool(want.pvalue < 0.01)


def three_runs(mean: float, sd: float) -> dict[int, float]:
    """Three runs with exactly this mean and standard deviation."""
    return arm(mean - sd, mean, mean + sd)


@pytest.mark.parametrize("beyond, holds", [(0.0021, False), (0.0022, True)])
def test_a_record_of_3_runs_against_3_with_sd_0_0007_needs_2_1_thousandths_beyond_the_margin(
    beyond, holds
):
    assert stats.t.ppf(0.99, 4) == pytest.approx(3.75, abs=5e-3)
    margin = 0.005 / math.log(2) / 2.436
    assert (
        record_rule(
            three_runs(1.1 - margin - beyond, 0.0007), three_runs(1.1, 0.0007), 1 / 2.436
        ).holds
        is holds
    )


@pytest.mark.parametrize("new, p, holds", [(1.09, 0, True), (1.0995, 1, False), (1.2, 1, False)])
def test_the_record_rule_without_spread(new, p, holds):
    got = record_rule(arm(new, new), arm(1.1, 1.1), 0.41)
    assert (got.p, got.holds) == (p, holds)


@settings(deadline=None)
@given(st.integers(2, 30), st.sampled_from([0.01, 0.05, 0.2]))
def test_the_detectable_difference_is_exactly_at_its_level(n, alpha):
    error = 0.0007 / math.sqrt(n)
    assert student(detectable(0.0007, n, alpha), error, n - 1)[1] == pytest.approx(alpha, rel=1e-9)


def test_the_detectable_difference_is_half_the_interval():
    a, b = normal_arm(1, 5), normal_arm(2, 4)
    pairs = paired(a, b)
    assert detectable(pairs.sd, pairs.n) == pytest.approx((pairs.high - pairs.low) / 2, rel=1e-9)


def test_known_t_quantiles():
    assert [detectable(1, n) * math.sqrt(n) for n in (2, 3, 5)] == pytest.approx(
        [12.706, 4.303, 2.776], abs=1e-3
    )


def test_one_pair_shows_nothing():
    with pytest.raises(Refusal, match="1 pairs"):
        detectable(0.001, 1)


# ── Words ─────────────────────────────────────────────────────────────────────────────────────────
def comparison(mean, low, high, **changes) -> Comparison:
    return Comparison(n=5, mean=mean, sd=0.002, t=1.0, df=4, p=0.002, low=low, high=high)._replace(
        **changes
    )


@pytest.mark.parametrize(
    "given_, words",
    [
        (
            comparison(-0.0123, -0.0146, -0.0100),
            "b is lower than a by 0.0123 BPB (95 % CI 0.0100 to 0.0146, p = 0.002, n = 5)",
        ),
        (
            comparison(0.0123, 0.0100, 0.0146),
            "b is higher than a by 0.0123 BPB (95 % CI 0.0100 to 0.0146, p = 0.002, n = 5)",
        ),
        (
            comparison(0.0123, 0.00002, 0.0246, p=0.04996, n=(3, 4)),
            "b is higher than a by 0.01230 BPB (95 % CI 0.00002 to 0.02460, p = 0.05, n = 3 and 4)",
        ),
        (
            comparison(-0.0003, -0.0011, 0.0005, p=0.41),
            "b is not distinguishable from a (difference -0.0003 BPB, 95 % CI -0.0011 to 0.0005 "
            "includes 0, p = 0.41, n = 5; 5 seeds could show 0.0008)",
        ),
        (
            comparison(-0.5, -0.5, -0.5, p=0.0, sd=0.0, n=2),
            "b is lower than a by 0.5000 BPB (95 % CI 0.5000 to 0.5000, p < 0.0001, n = 2, "
            "no spread between seeds)",
        ),
        (
            comparison(0.0, 0.0, 0.0, p=1.0, sd=0.0),
            "b is not distinguishable from a (difference 0.0000 BPB, 95 % CI 0.0000 to 0.0000 "
            "includes 0, p = 1, n = 5; the scores are the same)",
        ),
    ],
)
def test_verdicts_word_for_word(given_, words):
    assert verdict(given_) == words


def test_a_verdict_names_the_arms_and_the_metric():
    words = verdict(comparison(-12.3, -14.6, -10.0), names=("control", "qat"), metric="ms")
    assert words.startswith("qat is lower than control by 12.3000 ms")


@settings(deadline=None)
@given(ARM, ARM, st.sampled_from([paired, welch]))
def test_a_verdict_claims_a_difference_exactly_where_p_is_below_5_percent(a, b, compare):
    if len(a.keys() & b.keys()) >= 2 and abs(compare(a, b).p - 0.05) > 1e-9:
        got = compare(a, b)
        words = verdict(got)
        assert ("not distinguishable" in words) == (got.p > 0.05)
        assert (" lower " in words) == (got.p < 0.05 and got.mean < 0)
        assert not any(word in words for word in ("better", "worse", "win", "best"))


def test_two_seeds_are_judged_by_their_wide_interval():
    swa = paired(SWA_QAT[0, 0], SWA_QAT[1, 0])
    assert verdict(swa, ("no SWA", "SWA")) == (
        "SWA is lower than no SWA by 0.0014 BPB (95 % CI 0.0010 to 0.0019, p = 0.0147, n = 2)"
    )
    assert "not distinguishable" in verdict(
        paired(SWA_QAT[1, 0], SWA_QAT[1, 1])
    )  # +1.25 thousandths, df 1


@pytest.mark.parametrize(
    "mean, low, high, factor, places",
    [
        (0.0, -0.5, 0.5, 1.0, 4),
        (3e-8, -0.00745, 0.00746, 1000.0, 4),  # the mean between needs no more
        (0.01, 0.000004, 0.02, 1.0, 6),
        (0.01, 0.000004, 0.02, 1000.0, 4),
        (0.01, 1e-20, 0.02, 1.0, 9),
        (0.0, 0.0, 0.0, 1.0, 4),
    ],
)
def test_decimals_are_those_of_the_bounds(mean, low, high, factor, places):
    assert decimal_places(comparison(mean, low, high), factor=factor) == places


def test_a_factorial_row_in_words():
    interaction = factorial(SWA_QAT, FACTORS)[-1]
    assert verdict(interaction, ("0", interaction.term)) == (
        "SWA 1 - 0 x QAT 1 - 0 is higher than 0 by 0.0062 BPB "
        "(95 % CI 0.0035 to 0.0089, p = 0.0218, n = 2)"
    )


# ── Holm ──────────────────────────────────────────────────────────────────────────────────────────
P_VALUES = st.lists(st.floats(0, 1), min_size=1, max_size=30)


@pytest.mark.parametrize(
    "p_values, adjusted",
    [
        # at 5 % the first and the last are differences, as 0.005 < 0.05 / 4 and 0.01 < 0.05 / 3;
        # 0.03 > 0.05 / 2 ends it: the worked example of Wikipedia, Holm-Bonferroni method
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
        # p.adjust(c(0.01, 0.02, 0.03, 0.04, 0.05), "holm") of R
        ([0.01, 0.02, 0.03, 0.04, 0.05], [0.05, 0.08, 0.09, 0.09, 0.09]),
        ([0.7], [0.7]),
        ([0.6, 0.9], [1.0, 1.0]),
        ([], []),
    ],
)
def test_holm_of_worked_examples(p_values, adjusted):
    assert holm(p_values) == pytest.approx(adjusted)


@given(P_VALUES, st.randoms(use_true_random=False))
def test_holm_belongs_to_its_p_in_any_order_and_lies_between_p_and_bonferroni(p_values, random):
    adjusted = holm(p_values)
    order = random.sample(range(len(p_values)), len(p_values))
    assert holm([p_values[i] for i in order]) == [adjusted[i] for i in order]
    for p, corrected in zip(p_values, adjusted, strict=True):
        assert p <= corrected <= min(1, len(p_values) * p)


@given(P_VALUES, st.floats(0.001, 0.2))
def test_holm_is_the_step_down_procedure(p_values, level):
    """Reject the smallest below level / m, the next below level / (m - 1), until one is not."""
    rejected = set()
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        if p_values[i] * (len(p_values) - rank) >= level:
            break
        rejected.add(i)
    assert {i for i, p in enumerate(holm(p_values)) if p < level} == rejected


# ── Runs that may be compared ─────────────────────────────────────────────────────────────────────
@pytest.fixture
def two_runs() -> list[dict]:
    """Two runs of one arm, in the schema of a real result.json."""
    first = json.loads((ROOT / "logs/demo/result.json").read_text()) | {"name": "control-1"}
    first |= {"attention": "sdpa", "gpu": {"driver": "550.54.15", "power_limit_w": "700.00"}}
    second = copy.deepcopy(first) | {"name": "control-2", "seed": first["seed"] + 1, "val_bpb": 1.5}
    second["config"] |= {
        "seed": second["seed"],
        "run_id": "elsewhere",
        "data_path": "other",
        "logs_dir": "other",
    }
    return [first, second]


EACH_CHECK = pytest.mark.parametrize("check", [check_arm, check_alike])


@EACH_CHECK
def test_runs_that_differ_in_seed_place_and_score_are_alike(two_runs, check):
    assert check(two_runs) is None
    assert check([]) is None


def set_at(run: dict, key: str, value) -> None:
    *folders, last = key.split(".")
    for folder in folders:
        run = run[folder]
    assert last in run  # the real result.json has it
    run[last] = value


@EACH_CHECK
@pytest.mark.parametrize(
    "key",
    [
        "code_sha256",
        "data.val_sha256",
        "data.tokenizer_sha256",
        "data.train_tokens",
        "val_tokens",
        "val_bytes",
        "device",
        "gpu",
        "attention",
        "world_size",
        "threads_per_rank",
        "dtype",
        "compile",
        "cuda",
        "torch",
    ],
)
def test_other_code_data_or_machine_is_refused_by_key_values_and_names(two_runs, key, check):
    was = str(lookup(two_runs[1], key))
    set_at(two_runs[1], key, "changed")
    with pytest.raises(Refusal) as refusal:
        check(two_runs)
    assert str(refusal.value).startswith(f"{key} is {was} in control-1 but changed in control-2")


@EACH_CHECK
def test_a_key_that_a_run_lacks_is_a_difference(two_runs, check):
    del two_runs[1]["data"]
    with pytest.raises(
        Refusal,
        match=r"data.val_sha256 is .* in control-1 but \(absent\) in control-2 \(older code does",
    ):
        check(two_runs)


@EACH_CHECK
def test_what_older_code_does_not_record_agrees_with_itself_alone(two_runs, check):
    for run in two_runs:
        del run["gpu"], run["attention"]
    assert check(two_runs) is None
    two_runs[1]["gpu"] = None
    with pytest.raises(Refusal, match=r"gpu is \(absent\) in control-1 but None in control-2"):
        check(two_runs)


def test_other_settings_are_refused_within_an_arm_and_named(two_runs):
    two_runs[1]["config"] |= {"qat_enabled": False, "matrix_lr": 0.04}
    two_runs[1]["config_sha256"] = "0" * 64
    with pytest.raises(Refusal) as refusal:
        check_arm(two_runs)
    message = str(refusal.value)
    assert "config_sha256" in message
    assert "control-1" in message
    assert "control-2" in message
    assert (
        "(MATRIX_LR=0.02 against 0.04, QAT_ENABLED=True against False)" in message
    )  # and neither RUN_ID nor SEED
    assert check_alike(two_runs) is None


def test_one_seed_twice_is_refused_within_an_arm_only(two_runs):
    two_runs[1]["seed"] = two_runs[0]["seed"]
    with pytest.raises(
        Refusal, match=f"control-1 and control-2 both have seed {two_runs[0]['seed']}"
    ):
        check_arm(two_runs)
    assert check_alike(two_runs) is None


# ── Other kernels ─────────────────────────────────────────────────────────────────────────────────
def on_kernels(run: dict, *pairs: tuple[str, str]) -> list[dict]:
    """A run for each (ATTN_BACKEND, the kernel that it got)."""
    return [
        run
        | {"name": str(i), "seed": i, "attention": kernel}
        | {"config": run["config"] | {"attn_backend": asked}}
        for i, (asked, kernel) in enumerate(pairs)
    ]


def test_arms_that_ask_for_different_kernels_may_have_them_and_say_so(two_runs):
    runs = on_kernels(two_runs[0], ("auto", "sdpa"), ("flash", "flash"), ("auto", "sdpa"))
    assert check_alike(runs) is None
    assert differing(runs[0]["config"], runs[1]["config"]) == "ATTN_BACKEND=auto against flash"
    with pytest.raises(Refusal, match="attention is sdpa in 0 but flash in 1"):
        check_arm(runs[:2])


@pytest.mark.parametrize(
    "pairs", [[("auto", "sdpa")], [("flash", "flash"), ("auto", "sdpa")]], ids=len
)
def test_arms_for_which_auto_took_different_kernels_are_refused(two_runs, pairs):
    runs = on_kernels(two_runs[0], *pairs, ("auto", "cudnn"))
    words = f"attention is sdpa in {len(pairs) - 1} but cudnn in {len(pairs)}.*ATTN_BACKEND"
    with pytest.raises(Refusal, match=words):
        check_alike(runs)


def test_seeds_of_a_submission_may_be_launches_on_other_kernels_and_drivers(two_runs):
    first, second = two_runs
    second |= {"attention": "flash", "gpu": {"driver": "580.65.06"}}
    assert list(unlike({1: first, 2: second})) == []
    second["device"] = "changed"
    assert [problem.split(":")[0] for problem in unlike({1: first, 2: second})] == ["device"]


# ── Across code ───────────────────────────────────────────────────────────────────────────────────
@pytest.fixture
def two_codes(two_runs, tmp_path) -> list[dict]:
    """Two runs in folders that hold their scripts."""
    for run, text in zip(two_runs, ("a\nb\nc\n", "a\nB\nc\nd\n"), strict=True):
        folder = tmp_path / run["name"]
        folder.mkdir()
        (folder / "train_gpt.py").write_text(text)
        run |= {"name": str(folder), "code_sha256": hashlib.sha256(text.encode()).hexdigest()}
    return two_runs


def test_other_code_is_refused_with_the_option_that_allows_it(two_codes):
    with pytest.raises(Refusal, match=r"code_sha256 is .*--across-code"):
        check_alike(two_codes)
    assert check_alike(two_codes, across_code=True) is None
    with pytest.raises(Refusal) as refusal:
        check_arm(two_codes)
    assert "--across-code" not in str(refusal.value)  # one arm has one code


def test_across_code_lets_nothing_differ_but_the_code_and_what_it_records(two_codes):
    old, new = two_codes
    del old["gpu"]
    assert check_alike([old, new], across_code=True) is None
    for key in sorted({*FINGERPRINT} - {"code_sha256", "gpu"}):
        other = copy.deepcopy(new)
        set_at(other, key, "changed")
        with pytest.raises(Refusal, match=f"{key} is .* but changed"):
            check_alike([old, other], across_code=True)


def test_a_run_that_lacks_a_key_does_not_hide_that_two_others_differ(two_codes):
    old, new = two_codes
    del old["gpu"], old["attention"]
    for key in ("gpu", "attention"):
        other = copy.deepcopy(new) | {"name": "other", key: "changed"}
        with pytest.raises(Refusal, match=f"{key} is .* but changed in other"):
            check_alike([old, new, other], across_code=True)


def test_the_difference_of_code_is_named(two_codes):
    old, new = two_codes
    del old["gpu"]
    codes = [run["code_sha256"][:12] for run in two_codes]
    said = code_difference({"plain": [old], "qat": [new], "ema": [old]})
    assert said == (
        f"THE CODE DIFFERS: plain, ema ran code {codes[0]}; qat code {codes[1]} "
        "(1 lines less, 2 more) (not known of both: gpu)."
    )
    assert code_difference({"plain": [old], "ema": [old]}) == ""


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_text("x")])
def test_lines_are_not_counted_without_the_scripts_that_ran(two_codes, side, damage):
    damage(Path(two_codes[side]["name"]) / "train_gpt.py")
    said = code_difference({"a": two_codes[:1], "b": two_codes[1:]})
    assert "lines" not in said and two_codes[1]["code_sha256"][:12] in said
