"""What each arm of a study is worth beside its reference, a row for each."""

import statistics

from pages_studies import study

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
