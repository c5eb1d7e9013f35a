"""What each arm of a study is worth beside its reference, a row for each."""

import math
import statistics

import numpy as np
from pages_studies import how_it_ran, study

import train_gpt
from ablation.report import Compared, Finished, load_matrix, markdown_table


def beside_reference(found: Finished, metric: str) -> dict[str, Compared]:
    """Arm -> its comparison with the reference in this metric."""
    reference = found.matrix.study.reference
    return {
        one.names[1]: one
        for one in found.tests
        if one.names[0] == reference and one.figures[0] == metric and one.test
    }


def in_millis(one: Compared | None) -> str:
    """The mean difference and its 95 % interval, in thousandths."""
    if one is None:
        return ""
    mean, low, high = (1e3 * x for x in (one.test.mean, one.test.low, one.test.high))
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"


def times_the_references(found: Finished, arm: str, metric: str) -> float:
    """Median, over seeds, of the arm's figure by the reference's."""
    own = found.values(arm, metric)
    reference = found.values(found.matrix.study.reference, metric)
    return statistics.median(own[seed] / reference[seed] for seed in own.keys() & reference.keys())


def effects_of_training() -> str:
    """The frontier's study: every arm after few steps and, where it was run, after many."""
    ways = [("small", "steps"), ("demo", "steps"), ("small", "time")]
    found = [load_matrix(study("frontier_training", *way)) for way in ways]
    effects = [beside_reference(each, "val_bpb") for each in found]
    rows = []
    for arm, one in effects[0].items():
        millis = [in_millis(each.get(arm)) for each in effects]
        cost = times_the_references(found[0], arm, "step_ms_median")
        rows.append([f"`{arm}`", millis[0], f"{one.holm_p:.2g}", *millis[1:], f"{cost:.2f}"])
    reference = found[0].matrix.study.reference
    header = [
        f"arm - `{reference}`, mBPB (95 % CI)",
        f"{found[0].matrix.size.steps} steps",
        "Holm p",
        f"{found[1].matrix.size.steps} steps",
        f"{found[2].matrix.size.seconds:g} s",
        f"a step takes, x that of `{reference}`",
    ]
    return markdown_table(header, rows)


# The arms of the study of export whose fineness alone differs, from coarse to fine
FINENESS = ("gptq_k20", "gptq", "gptq_k8")


def mean_of(found: Finished, arm: str, *metrics: str) -> float:
    """Mean, over seeds, of the sum of these figures; those that an arm has not count as 0."""
    values = [found.values(arm, metric) for metric in metrics]
    seeds = set().union(*values)
    return statistics.fmean(sum(each.get(seed, 0) for each in values) for seed in seeds)


def beside_gptq_of_equal_bytes(found: Finished, arm: str) -> float | None:
    """Mean BPB - that of GPTQ whose k gives as many bytes; None beyond the arms with other k.

    Between two k the BPB is taken to be linear in the logarithm of the bytes.
    """
    sizes = [math.log(mean_of(found, each, "artifact_bytes")) for each in FINENESS]
    size = math.log(mean_of(found, arm, "artifact_bytes"))
    if not sizes[0] <= size <= sizes[-1]:
        return None
    scores = [mean_of(found, each, "val_bpb") for each in FINENESS]
    return mean_of(found, arm, "val_bpb") - float(np.interp(size, sizes, scores))


def scored_otherwise(found: Finished, arm: str) -> bool:
    """Whether an arm scores in another way than the reference: bytes have no part in that."""
    names = found.matrix.study.arms[arm]
    return any(train_gpt.BY_NAME[name].metadata["scope"] == "eval" for name in names)


def effects_of_export(size: str) -> str:
    """Every arm of the study of export: BPB and bytes beside the reference, and its seconds."""
    found = load_matrix(study("frontier_export", size, "steps"))
    reference = found.matrix.study.reference
    bpb = beside_reference(found, "val_bpb")
    rows = []
    for arm in found.matrix.arms:
        own = mean_of(found, arm, "artifact_bytes")
        share = 100 * (own / mean_of(found, reference, "artifact_bytes") - 1)
        effect = 1e3 * (mean_of(found, arm, "val_bpb") - mean_of(found, reference, "val_bpb"))
        traded = abs(share) >= 0.5 and not scored_otherwise(found, arm)
        equal = beside_gptq_of_equal_bytes(found, arm)
        export = mean_of(found, arm, "seconds.calibrate", "seconds.quantise and compress")
        rows.append(
            [
                f"`{arm}`",
                f"{mean_of(found, arm, 'val_bpb'):.5f}",
                in_millis(bpb.get(arm)),
                f"{own:,.0f}",
                f"{share:+.2f} %",
                f"{effect / share:+.2f}" if traded else "",
                "" if equal is None else f"{1e3 * equal:+.2f}",
                f"{export:.1f}",
                f"{mean_of(found, arm, 'eval_seconds'):.1f}",
            ]
        )
    header = [
        "arm",
        "BPB",
        f"- `{reference}`, mBPB (95 % CI)",
        "artifact, bytes",
        f"- `{reference}`",
        "mBPB per 1 % of bytes",
        "- GPTQ of equal bytes, mBPB",
        "export, s",
        "scoring, s",
    ]
    return f"{how_it_ran(found.matrix, found.all())}\n\n{markdown_table(header, rows)}"
