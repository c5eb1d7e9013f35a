"""The tables of docs/studies.md, from the committed runs of the studies."""

import shutil
from pathlib import Path

from ablation.ledger import Ledger
from ablation.records import RunStore, keep, training_of
from ablation.report import (
    arm_table,
    comparison_table,
    factorial_table,
    load_matrix,
    markdown_table,
    shown_table,
)
from ablation.study import Matrix, matrix, read_study
from train_gpt import CODE_SHA256, COMPARED, Config, setting

ROOT = Path(__file__).resolve().parents[1]
COMMITTED = ROOT / "logs" / "studies"  # the runs of studies, as lines

PULL_REQUESTS = (
    "pr989_qat_x_swa",
    "pr199_swa_doc_isolated",
    "pr975_qna_sqwa",
    "pr145_int8_qat",
    "pr194_11l_record",
)

# (study, size, what all arms get) of every table
STUDIES = [
    *((name, "small", equal) for name in PULL_REQUESTS for equal in ("steps", "time")),
    ("pr199_swa_doc_isolated", "docs", "steps"),
    ("pr199_swa_doc_isolated", "fineweb", "steps"),
    ("swa_sums_in_bf16", "small", "steps"),
    ("frontier_training", "small", "steps"),
    ("frontier_training", "small", "time"),
    ("frontier_training", "demo", "steps"),
    ("frontier_training", "text", "steps"),
    ("frontier_training", "text4096", "steps"),
    ("frontier_export", "small", "steps"),
    ("frontier_export", "large", "steps"),
    ("leaderboard", "small", "steps"),
]

# Studies whose equal time was run with all seeds, others with the first three
FIVE_SEEDS = ("pr989_qat_x_swa", "frontier_training")

# How often a run speaks and is scored on the way, and how many windows at a time
OFTEN = {"train_log_every", "val_loss_every", "eval_batch_seqs"}

# Columns that the pages leave out
LONG_ARMS = {"settings", "published, expected", "code + artifact, bytes"}
LONG_DIFFERENCES = {"in words", "paired t (df)"}


def study(stem: str, size: str, equal: str, logs: Path = COMMITTED) -> Matrix:
    """The matrix of committed logs."""
    folder = logs / stem / f"{size}-{equal}"
    seeds = (1, 2, 3) if equal == "time" and stem not in FIVE_SEEDS else ()
    return matrix(read_study(ROOT / "studies" / f"{stem}.toml"), size, equal, seeds, folder)


def age_of(run: dict) -> str:
    """The code of a run, and whether it is today's."""
    age = "today's" if run["code_sha256"] == CODE_SHA256 else "older than today's"
    return f"`{run['code_sha256'][:12]}`, {age}"


def how_it_ran(made: Matrix, runs: list[dict]) -> str:
    """The command, the budget, the machine and the code, in one sentence."""
    trainings = len({training_of(run) for run in runs})
    first = runs[0]
    # studies of several vocabularies score the same bytes
    targets = sorted({run["val_tokens"] for run in runs})
    counts = " to ".join(f"{n:,}" for n in dict.fromkeys((targets[0], targets[-1])))
    return (
        f"`{made.command()}`: {made.budget()} for every arm, {len(runs)} runs of {trainings} "
        f"trainings on {first['device']}, {made.size.jobs} side by side, "
        f"threads: {first['threads_per_rank']}, torch {first['torch']}; "
        f"scored: {counts} targets of {first['val_bytes']:,} bytes; "
        f"code {age_of(first)}."
    )


def shortened(header: list[str], rows: list[list], dropped: set[str]) -> str:
    """The table without these columns, and without those that say nothing."""
    kept = []
    for i, name in enumerate(header):
        if name not in dropped and any(row[i] != "-" for row in rows):
            kept.append(i)
    return markdown_table([header[i] for i in kept], [[row[i] for i in kept] for row in rows])


def study_tables(stem: str, size: str, equal: str) -> str:
    """A study in short form: how it ran, the arms, the differences, the factorial, its figures."""
    made = study(stem, size, equal)
    found = load_matrix(made)
    long_arms = LONG_ARMS | {"steps"} if equal == "steps" else LONG_ARMS
    tables = [
        (arm_table(found), long_arms),
        (comparison_table(found), LONG_DIFFERENCES),
        (factorial_table(found), set()),
        (shown_table(found), set()),
    ]
    blocks = [how_it_ran(made, found.all())]
    for (header, rows), dropped in tables:
        if rows:
            blocks.append(shortened(header, rows, dropped))
    return "\n\n".join(blocks)


def published_rows() -> str:
    """Every published configuration: how it is run here, and where its study differs on purpose."""
    figures = {}
    cells = {}
    for stem in PULL_REQUESTS:
        made = read_study(ROOT / "studies" / f"{stem}.toml")
        arms = {trial.arm: trial.cfg for trial in matrix(made, "full", "time", (1,)).trials}
        for arm, commands in made.commands.items():
            published = made.facts[arm].get("published", {})
            found = published.get("val_bpb", [])
            for place, command in enumerate(commands):
                row = Config.from_env(command)
                key = stem, arm, row.digest()
                own = found[place : place + 1] if len(commands) > 1 else found
                figures.setdefault(key, []).extend(f"{bpb:.5f}" for bpb in own)
                title = f"#{stem[2:5]} {published['row']}"
                names = arms[arm].differing(row.knobs(*COMPARED))
                differing = ", ".join(f"`{n.upper()}`" for n in names if n not in OFTEN)
                cells[key] = [title, short_command(row), f"`{arm}`", differing]

    header = ["published row", "BPB of its seeds", "command here", "arm", "its arm differs in"]
    rows = [[c[0], ", ".join(figures[key]), *c[1:]] for key, c in cells.items()]
    return markdown_table(header, rows)


def short_command(row: Config) -> str:
    """What a configuration changes in its base."""
    bare = Config.from_env({"BASE": row.base}).knobs(*COMPARED)
    words = [f"BASE={row.base}"]
    for name, value in row.knobs(*COMPARED).items():
        if value != bare[name] and name not in OFTEN:
            words.append(setting(name, value))
    return f"`{' '.join(words)}`"


def adopt(logs: Path, kept: Path = COMMITTED) -> None:
    """Replaces the committed logs of each study that has been run to its end below `logs`.

    A run folder per trial becomes a line of results.jsonl and lines of metrics.jsonl.
    """
    for stem, size, equal in STUDIES:
        made = study(stem, size, equal, logs)
        store = RunStore(made.folder)
        found = {trial.id: store.find(trial.id) for trial in made.trials}
        runs = {trial: run for trial, run in found.items() if run is not None}
        ended = runs.keys() | Ledger(made.folder).failures(made.trials).keys()
        if len(ended) < len(found):
            continue
        folder = kept / stem / made.folder.name
        shutil.rmtree(folder, ignore_errors=True)
        keep(folder, runs)
        shutil.copy(made.folder / "ledger.jsonl", folder)
