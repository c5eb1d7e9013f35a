"""The leaderboard beside what two CPU cores make of it, from the logs of its study."""

import statistics
from collections import Counter

from pages_studies import study as committed

from ablation.answers import compare_sides
from ablation.report import Finished, load_matrix, markdown_table
from ablation.statistics import rank_correlation
from ablation.study import ROOT, Matrix, Study, read_study
from train_gpt import base_tables, read_base

METRIC = "val_bpb"


def leaderboard() -> str:
    """The block of docs/frontier.md."""
    return leaderboard_table(read_study(ROOT / "studies" / "leaderboard.toml"))


def leaderboard_small() -> str:
    """What two cores made of it, once its runs are committed."""
    return steps_seen(load_matrix(committed("leaderboard", "small", "steps")))


def published(study: Study, arm: str) -> dict:
    return study.facts[arm]["published"]


def in_order(study: Study) -> list[str]:
    """The arms that have a place on the leaderboard, the worst first."""
    placed = [arm for arm in study.arms if "score" in published(study, arm)]
    return sorted(placed, key=lambda arm: -published(study, arm)["score"])


def made_from(study: Study, arm: str) -> str:
    """The base in which this arm changes something; empty: in none."""
    settings = study.arms[arm]
    base = settings["BASE"]
    if settings.keys() == {"BASE"}:
        base = base_tables()[base].get("base", "")
    return f"`{base}`" if base else ""


def missing_rows(study: Study) -> list[list[str]]:
    rows = [[f"`{name}`", f"{score:.4f}", why] for name, (score, why) in study.missing.items()]
    return sorted(rows, key=lambda row: row[1], reverse=True)


def leaderboard_table(study: Study) -> str:
    """Every arm with the figures of its logs, and every row that is none with the reason."""
    rows = []
    for arm in [*in_order(study), *(set_of_seeds(study))]:
        facts = published(study, arm)
        mean = {key: statistics.mean(facts[key]) for key in ("bpb", "total_bytes", "steps", "ms")}
        rows.append(
            [
                f"`{arm}`",
                f"{facts['score']:.4f}" if "score" in facts else "",
                f"{mean['bpb']:.5f}",
                str(len(facts["bpb"])),
                f"{mean['total_bytes']:,.0f}",
                f"{mean['steps']:,.0f}",
                f"{mean['ms']:.1f}",
                made_from(study, arm),
                ", ".join(read_base(study.arms[arm]["BASE"]).lacks),
            ]
        )
    header = ["arm", "score", "BPB, mean of seeds", "n", "bytes", "steps", "ms", "from", "lacks"]
    tables = [markdown_table(header, rows)]
    tables.append(markdown_table(["no arm", "score", "why"], missing_rows(study)))
    return "\n\n".join(tables)


def set_of_seeds(study: Study) -> list[str]:
    """The arms without a place on the leaderboard."""
    return [arm for arm in study.arms if "score" not in published(study, arm)]


def sign_of(low: float, high: float) -> str:
    """What an interval of a difference from the record before says of the step."""
    if high < 0:
        return "seen"
    return "the other way" if low > 0 else "not distinguishable"


def steps_seen(found: Finished) -> str:
    """Published BPB at full size beside ours at small size, step by step, and the rank correlation.

    A step is seen where the 95 % interval of ours, paired by seed, lies below 0.
    """
    study = found.matrix.study
    arms = [arm for arm in in_order(study) if found.values(arm, METRIC)]
    theirs = [statistics.mean(published(study, arm)["bpb"]) for arm in arms]
    ours = [statistics.mean(found.values(arm, METRIC).values()) for arm in arms]
    rows = []
    for place, arm in enumerate(arms):
        row = [f"`{arm}`", f"{theirs[place]:.5f}", f"{ours[place]:.4f}", "", "", ""]
        if place:
            before = arms[place - 1]
            values = found.values(before, METRIC), found.values(arm, METRIC)
            test = compare_sides((before, arm), (METRIC, METRIC), *values).test
            row[3] = f"{1e3 * (theirs[place] - theirs[place - 1]):+.1f}"
            if test:
                mean, low, high = (1e3 * x for x in (test.mean, test.low, test.high))
                row[4] = f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"
                row[5] = sign_of(low, high)
        rows.append(row)
    header = [
        "arm",
        "published BPB",
        "ours, BPB",
        "step there, mBPB",
        "step here, mBPB (95 % CI)",
        "here",
    ]
    count = Counter(row[5] for row in rows[1:])
    sentences = [
        f"Rank correlation (Spearman) of all {ranks_in_words(theirs, ours)} (Fisher's z, variance "
        "of Bonett and Wright 2000).",
        *within_vocabularies(found.matrix, arms, theirs, ours),
        f"Of {len(rows) - 1} steps {count['seen']} are seen, {count['the other way']} go the other "
        f"way, {count['not distinguishable']} cannot be told from nothing.",
    ]
    return f"{' '.join(sentences)}\n\n{markdown_table(header, rows)}"


def ranks_in_words(theirs: list[float], ours: list[float]) -> str:
    ranks = rank_correlation(theirs, ours)
    return f"{ranks.n} arms: {ranks.rho:.2f}, 95 % interval {ranks.low:.2f} to {ranks.high:.2f}"


def within_vocabularies(
    made: Matrix, arms: list[str], theirs: list[float], ours: list[float]
) -> list[str]:
    """The same of the arms that share one, where these are enough; in the order of the arms."""
    sizes = {trial.arm: trial.cfg.vocab_size for trial in made.trials}
    sentences = []
    for size in dict.fromkeys(sizes[arm] for arm in arms):
        places = [place for place, arm in enumerate(arms) if sizes[arm] == size]
        if len(places) >= 4:
            words = ranks_in_words([theirs[p] for p in places], [ours[p] for p in places])
            sentences.append(f"Of those with {size:,} tokens here, {words}.")
    return sentences
