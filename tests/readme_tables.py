"""The generated parts of README.md and docs/: from the code and the committed logs of the demo,
the studies and the bench.

`python tests/readme_tables.py` (make readme) rewrites them; test_readme.py fails when they are
stale. With a folder of runs, such as logs/runs, the committed logs of studies are first replaced by
those.
"""

import functools
import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from demo_picture import demo_picture

import bench
import train_gpt
from ablation.records import RunStore, keep
from ablation.report import arm_table, comparison_table, factorial_table, load_matrix
from ablation.report import markdown_table as markdown
from ablation.runner import Ledger
from ablation.study import Matrix, read_study
from ablation.study import matrix as trials_of
from studies import banded_scoring

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PICTURE = ROOT / "docs" / "demo.svg"
DEMO, BENCH = ROOT / "logs" / "demo", ROOT / "logs" / "bench"
COMMITTED = ROOT / "logs" / "studies"  # the runs of studies, as lines

# of the demo's log, the first (or last) line that starts so
DEMO_LINES = (
    ("run ", 0),
    ("model: ", 0),
    ("schedule (measured speed)", 0),
    ("step ", -1),
    ("trained ", 0),
    ("export: ", -1),
    ("sliding ", 0),
    ("RESULT ", 0),
)
TOGGLES = {  # knob that switches a technique -> the knobs that tune it start with
    "smear_gate": "SMEAR_",
    "bigram_vocab_size": "BIGRAM_",
    "ve_enabled": "VE_",
    "xsa_last_n": "",
    "ln_scale": "",
    "rope_ntk_len": "ROPE_",
    "qat_enabled": "QAT_",
    "qna_enabled": "QNA_",
    "swa_enabled": "SWA_",
    "ema_enabled": "EMA_",
    "sqwa_enabled": "SWA_",
    "prune_pct": "",
    "fit_to_cap": "CAP_",
    "doc_isolated_eval": "EVAL_",
    "ttt_mode": "TTT_",
}


# What happens when, what one sees, exit code, what is kept,
# and the tests: FILE: NAME, NAME; FILE: NAME
FAULTS = [
    (
        "the pod dies, `kill -9`, at any moment",
        "nothing; `RESUME=1` with the same `RUN_ID` goes on",
        "137",
        "all up to the last checkpoint (every `CHECKPOINT_EVERY` seconds, and after training)",
        "test_faults: after_kill_9_at_any_moment_the_run_goes_on_to_the_same_end",
    ),
    (
        "SIGTERM or Ctrl-C while training",
        "the step under way is finished on all ranks, then `saved after N steps`",
        "143, 130",
        "every step",
        (
            "test_resume: a_resumed_run_equals_the_uninterrupted_one_bit_for_bit, "
            "a_signal_to_one_rank_stops_all_after_the_same_step; test_pipeline: "
            "a_signal_ends_the_run_with_its_exit_code_and_one_line"
        ),
    ),
    (
        "SIGTERM or Ctrl-C after training",
        "one line with the phase",
        "143, 130",
        "the training; `RESUME=1` exports and scores",
        "test_resume: a_run_stopped_after_training_exports_and_scores_without_training_again",
    ),
    (
        "the newest checkpoint is torn or damaged",
        "`WARNING ... the one before it is used`",
        "0",
        "the checkpoint before it; the damaged one as `checkpoint.damaged`",
        (
            "test_resume: a_damaged_checkpoint_is_recognised_and_the_one_before_it_used_loudly, "
            "what_is_no_damage_leaves_the_checkpoints_as_they_are"
        ),
    ),
    (
        "both are",
        "`no checkpoint ... is whole`",
        "2",
        "everything as it lies there",
        "test_resume: without_a_whole_checkpoint_the_run_is_refused_and_nothing_is_touched",
    ),
    (
        "`RESUME=1` with other training settings, or another script",
        "the setting with both values, or the path of the right script",
        "2",
        "everything",
        (
            "test_resume: another_training_setting_is_refused_with_both_values, "
            "another_script_is_refused_and_the_one_that_began_is_kept"
        ),
    ),
    (
        "`RESUME=1` of a complete run",
        "`nothing is left to do`",
        "that of the run",
        "everything",
        "test_resume: a_complete_run_is_left_alone_and_keeps_its_exit_code",
    ),
    (
        "a second process works on the same run",
        "`another process is at work there`",
        "2",
        "everything; the first goes on",
        "test_resume: two_processes_never_work_on_one_run",
    ),
    (
        "one rank is killed",
        "`lost rank N in phase '...'` from each other rank, about 5 s later",
        "6",
        "up to the last checkpoint",
        "test_faults: when_one_rank_is_killed_the_others_name_it_and_stop",
    ),
    (
        "a host is lost, or the link to it",
        "the same, after `DIST_TIMEOUT` and some 10 s",
        "6",
        "up to the last checkpoint; `RESUME=1` on the hosts that are left",
        (
            "test_hosts: "
            "a_link_that_loses_all_packets_ends_both_hosts_in_time_and_the_run_goes_on_once_mended"
            ", a_killed_host_ends_the_other_in_time_and_the_run_goes_on_with_what_is_left"
        ),
    ),
    (
        "the ranks' weights drift apart",
        "`the ranks hold different weights`, at the next line of the log or checkpoint",
        "6",
        "the last checkpoint before",
        "test_faults: ranks_that_drift_apart_are_noticed_before_the_next_checkpoint",
    ),
    (
        "disk full at the start of training",
        "file and `No space left on device`, before a step is made",
        "7",
        "everything",
        "test_faults: a_full_disk_is_one_line_and_costs_nothing_that_was_finished",
    ),
    (
        "disk full while training",
        "the same, at the next line of the log or checkpoint",
        "7",
        "up to the last checkpoint",
        (
            "test_faults: a_disk_that_fills_up_while_training_leaves_the_last_checkpoint, "
            "a_log_that_cannot_be_written_is_one_line"
        ),
    ),
    (
        "disk full at artifact.bin or result.json",
        "the same",
        "7",
        "the training; `RESUME=1` exports and scores",
        "test_faults: a_full_disk_is_one_line_and_costs_nothing_that_was_finished",
    ),
    (
        "LOGS_DIR cannot be written",
        "`cannot create`",
        "2",
        "everything",
        "test_faults: a_log_folder_that_cannot_be_made_is_refused",
    ),
    (
        "a shard is deleted, cut, overwritten (2) or cannot be read (7) while training",
        "the shard and what is wrong with it",
        "2, 7",
        (
            "on one rank every step (`saved after N steps`); on several, which may not see the "
            "same, up to the last checkpoint"
        ),
        (
            "test_faults: a_shard_that_changes_while_training_stops_the_run_and_loses_no_step, "
            "what_one_rank_alone_refuses_is_told_by_that_rank"
        ),
    ),
    (
        "a shard with wrong magic or length, or a token beyond the vocabulary",
        "the shard and what is wrong with it",
        "2",
        "nothing was begun",
        (
            "test_data: a_damaged_shard_is_refused_with_file_and_remedy, "
            "a_token_outside_the_vocabulary_is_refused_with_file_and_id"
        ),
    ),
    (
        "validation split empty, or without text",
        "`0 tokens`, `0 bytes of text`",
        "2",
        "nothing was begun",
        "test_faults: an_empty_or_tiny_validation_split_is_refused_before_anything_is_trained",
    ),
    (
        "NaN or Inf in loss or gradients",
        "step, tensor and remedy, then `saved after N steps`",
        "5",
        "the state before that step; `NONFINITE=skip` goes on without it, 9 times in a row at most",
        (
            "test_faults: nan_or_inf_stops_before_it_reaches_the_weights, "
            "weights_that_are_not_finite_are_never_saved_and_the_log_says_so, "
            "a_periodic_checkpoint_that_was_not_written_is_told, "
            "a_skipped_step_leaves_weights_moments_and_averages_alone, "
            "a_run_of_nothing_but_nan_stops_although_steps_may_be_skipped"
        ),
    ),
    (
        "out of memory",
        "phase and knob to turn",
        "8",
        "up to the last checkpoint",
        "test_faults: out_of_memory_names_the_phase_and_the_knob",
    ),
    (
        "the clock jumps, the machine sleeps",
        "nothing; budgets follow a monotonic clock",
        "0",
        "everything",
        (
            "test_faults: a_wall_clock_that_jumps_changes_nothing, "
            "a_machine_that_slept_ends_the_run_in_good_order"
        ),
    ),
    (
        "more ranks than rows in a step",
        "`fewer rows than N ranks`",
        "2",
        "nothing was begun",
        "test_faults: more_ranks_than_rows_are_refused_on_every_rank",
    ),
    (
        "an artifact or checkpoint that is damaged, forged or huge",
        "`not one of our files, or damaged`",
        "2",
        "everything",
        (
            "test_export: a_flipped_bit_anywhere_is_refused, "
            "a_decompression_bomb_is_refused_in_little_memory, "
            "a_hostile_configuration_is_refused"
        ),
    ),
]


def fault_tests() -> list[tuple[str, str]]:
    """(file, test function) of every row."""
    return [
        (part.partition(": ")[0], f"test_{name}")
        for *_, tests in FAULTS
        for part in tests.split("; ")
        for name in part.partition(": ")[2].split(", ")
    ]


def faults() -> str:
    def named(tests: str) -> str:
        return "<br>".join(
            f"{part.partition(': ')[0]}: "
            + ", ".join(f"`{n}`" for n in part.partition(": ")[2].split(", "))
            for part in tests.split("; ")
        )

    return markdown(
        ["what happens when", "what you see", "exit code", "what is kept", "shown by tests/"],
        [[*row, named(tests)] for *row, tests in FAULTS],
    )


def soak() -> str:
    """logs/bench/soak.json in words."""
    r = json.loads((BENCH / "soak.json").read_text())
    stops = ", ".join(
        f"{s['n']} x {how} (all ended within {s['slowest_seconds']:.0f} s)"
        for how, s in sorted(r["stops"].items())
    )
    return (
        f"`python tests/soak.py --seconds 3700`, {r['device']}, {r['ranks']} ranks, torch "
        f"{r['torch']}, beside other work, code "
        f"{r['code_sha256'][:12]}: {len(r['runs'])} runs of the demo's settings with 60 s of "
        "training each, "
        f"{r['seconds'] / 60:.0f} minutes, {r['attempts']} launches; stopped by {stops}. Every "
        "run came to its end. Ranks that were still at "
        "work 40 s after their launcher had been killed: "
        f"{r['ranks_at_work_40_s_after_their_launcher']}. They go on to the end of "
        "their run, and its lock keeps a second launch away meanwhile. Open files of a rank, "
        f"second half of a launch: {r['open_files_growth']:+d} at most; a complete "
        f"run's folder: {min(run['bytes'] for run in r['runs']) / 1e6:.1f} to "
        f"{max(run['bytes'] for run in r['runs']) / 1e6:.1f} MB, "
        f"six files in each. Resident memory of a rank: {r['peak_rss'] / 1e6:.0f} MB at most."
    )


def studied() -> dict[str, list[str]]:
    """Variable -> the pull requests whose study has an arm with another value than the default."""
    found = {}
    for path in sorted((ROOT / "studies").glob("pr*.toml")):
        number = re.match(r"pr(\d+)", path.stem)[1]
        study = read_study(path)
        for arm in study.arms.values():
            cfg = train_gpt.Config.from_env({**study.env, **study.sizes["full"].env, **arm})
            for name in cfg.non_default():
                if number not in found.setdefault(name, []):
                    found[name].append(number)
    return found


def toggles() -> str:
    knobs = {f.name: f for f in train_gpt.KNOBS}
    setters = studied()
    rows = []
    for name, prefix in TOGGLES.items():
        f = knobs[name]
        default = int(f.default) if f.type == "bool" else f.default
        tuned = [
            k.upper()
            for k in knobs
            if prefix
            and k.upper().startswith(prefix)
            and k not in TOGGLES
            and knobs[k].metadata["scope"] != "run"
        ]
        rows.append(
            [
                f"`{name.upper()}`",
                default,
                f.metadata["doc"],
                " ".join(f"`{k}`" for k in tuned),
                " ".join(setters.get(name.upper(), ())),
            ]
        )
    return markdown(["variable", "default", "what it does", "tuned by", "studies of"], rows)


def exit_codes() -> str:
    return markdown(
        ["code", "meaning"], [[code, text] for code, text in train_gpt.EXIT_CODES.items()]
    )


def demo_output() -> str:
    return "```text\n" + (DEMO / "train.log").read_text().rstrip() + "\n```"


def demo_lines() -> str:
    """Eight lines of the demo's log."""
    log = (DEMO / "train.log").read_text().splitlines()
    chosen = [
        [line for line in log if line.startswith(start)][which] for start, which in DEMO_LINES
    ]
    return "\n".join(["```text", *chosen, "```"])


def demo_summary() -> str:
    r = json.loads((DEMO / "result.json").read_text())
    return (
        f"Measured: {r['device']}, {r['world_size']} ranks of {r['threads_per_rank']} thread, "
        f"torch {r['torch']}, 1 seed, "
        f"command `make train`: {r['steps']} steps of {r['step_ms_median']:.0f} ms "
        f"({r['tokens_seen'] / r['train_seconds']:,.0f} tokens/s) in {r['train_seconds']:.1f} s, "
        f"{sum(r['seconds'].values()):.0f} s in all."
    )


def study(stem: str, size: str, equal: str, logs: Path = COMMITTED) -> Matrix:
    """The matrix of committed logs; equal time was run with three seeds."""
    folder = logs / stem / f"{size}-{equal}"
    seeds = (1, 2, 3) if equal == "time" else ()
    return trials_of(read_study(ROOT / "studies" / f"{stem}.toml"), size, equal, seeds, folder)


def study_tables(stem: str, size: str, equal: str) -> str:
    """The tables of a study in short form: how it ran, the arms, the differences, the factorial."""
    matrix = study(stem, size, equal)
    found = load_matrix(matrix)
    runs = found.all()
    budget = (
        f"{matrix.size.steps} steps"
        if equal == "steps"
        else f"{matrix.size.seconds:g} s of training"
    )
    r, trainings = runs[0], sum(not run["checkpoint"] for run in runs)
    blocks = [
        f"`{matrix.command()}`: {budget} for every arm, {len(runs)} runs of {trainings} trainings "
        f"on {r['device']}, "
        f"{matrix.size.jobs} side by side, threads: {r['threads_per_rank']}, torch {r['torch']}; "
        "scored: "
        f"{r['val_tokens']:,} targets of {r['val_bytes']:,} bytes."
    ]
    long = {
        "settings",
        "published, expected",
        "code + artifact, bytes",
        "steps" * (equal == "steps"),
    }
    for (header, rows), drop in [
        (arm_table(found), long),
        (comparison_table(found), {"in words", "paired t (df)"}),
        (factorial_table(found), set()),
    ]:
        kept = [
            i
            for i, name in enumerate(header)
            if name not in drop and any(row[i] != "-" for row in rows)
        ]
        if rows:
            blocks.append(
                markdown([header[i] for i in kept], [[row[i] for i in kept] for row in rows])
            )
    return "\n\n".join(blocks)


def adopt(logs: Path, kept: Path = COMMITTED) -> None:
    """Replaces the committed logs of each study that has been run to its end below `logs`.

    A run folder per trial becomes a line of results.jsonl and lines of metrics.jsonl.
    """
    for stem, size, equal in STUDIES:
        matrix = study(stem, size, equal, logs)
        store = RunStore(matrix.folder)
        found = {trial.id: store.find(trial.id) for trial in matrix.trials}
        runs = {trial: run for trial, run in found.items() if run is not None}
        ended = runs.keys() | Ledger(matrix.folder).failures(matrix.trials).keys()
        if len(ended) < len(found):
            continue
        folder = kept / stem / matrix.folder.name
        shutil.rmtree(folder, ignore_errors=True)
        keep(folder, runs)
        shutil.copy(matrix.folder / "ledger.jsonl", folder)


def speed() -> str:
    return bench.table(json.loads((BENCH / "demo.json").read_text()), markdown=True)


def demo_settings() -> str:
    """What 2 cores do with the demo's model: the whole step, by ranks, threads and compiler."""
    rows = []
    for path in [BENCH / f"{name}.json" for name in ("demo", "demo_1x2", "demo_compiled")]:
        report = json.loads(path.read_text())
        row = {row["name"]: row for row in report["rows"]}
        step, warm = (
            row["step, whole"],
            next(r for name, r in row.items() if name.startswith("warm-up")),
        )
        rows.append(
            [
                f"`{path.name}`",
                report["world_size"],
                report["threads_per_rank"],
                "yes" if report["compile"] else "no",
                f"{step['ms']:.1f}",
                f"{step['rate']:,.0f}",
                f"{warm['ms'] / 1e3:.1f}",
            ]
        )
    return markdown(
        [
            "logs/bench/",
            "ranks",
            "threads each",
            "compiled",
            "step, ms",
            "tokens/s",
            "warm-up and compile, s",
        ],
        rows,
    )


def artifact() -> str:
    """The demo's checkpoint exported with every compressor;
    zstd in frames against one frame, from the bench.
    """
    runs = [
        json.loads((BENCH / f"artifact_{name}.json").read_text())
        for name in ("zlib", "lzma", "zstd", "ans")
    ]
    rows = []
    for r in runs:
        stored, codes = r["codes"]["stored_bytes"], r["codes"]
        rows.append(
            [
                f"`COMPRESSOR={codes['compressor']}`",
                f"{r['artifact_bytes']:,}",
                f"{stored:,}",
                f"{8 * stored / codes['weights']:.3f}",
                f"{100 * (stored / codes['order0_bytes'] - 1):+.2f} %",
                f"{r['seconds']['quantise and compress']:.2f}",
                f"{r['seconds']['read back']:.2f}",
                f"{r['quantised_val_bpb']:.6f}",
            ]
        )
    bench_rows = {row["name"]: row for row in json.loads((BENCH / "demo.json").read_text())["rows"]}
    zstd = bench_rows["compress, zstd 22"]
    return (
        f"{codes['weights']:,} codes, order-0 entropy {codes['order0_bytes']:,} bytes; "
        f"{r['device']}, 1 seed; "
        "`CHECKPOINT=logs/demo/checkpoint.bin COMPRESSOR=... EVAL_STRIDE=0 python train_gpt.py` "
        "in the environment of the demo\n\n"
        + markdown(
            [
                "",
                "artifact, bytes",
                "codes and scales",
                "bits per weight",
                "against order-0",
                "export, s",
                "read back, s",
                "quantised BPB",
            ],
            rows,
        )
        + (
            f"\n\nzstd in frames and in one, on the bench's weights: {zstd['note']}, "
            f"{zstd['ms']:.0f} ms and {zstd['twin_ms']:.0f} ms."
        )
    )


def banded() -> str:
    report = json.loads((BENCH / "banded_scoring.json").read_text())
    return (
        f"`{report['command']}`, {report['environment']['device']}, 1 thread\n\n"
        + banded_scoring.table(report)
    )


STUDIES = [
    *(
        (stem, "small", equal)
        for stem in (
            "pr989_qat_x_swa",
            "pr199_swa_doc_isolated",
            "pr975_qna_sqwa",
            "pr145_int8_qat",
            "pr194_11l_record",
        )
        for equal in ("steps", "time")
    ),
    ("pr199_swa_doc_isolated", "docs", "steps"),
    ("pr199_swa_doc_isolated", "fineweb", "steps"),
    ("swa_sums_in_bf16", "small", "steps"),
]
BLOCKS = {
    "toggles": toggles,
    "exit-codes": exit_codes,
    "faults": faults,
    "soak": soak,
    "demo-lines": demo_lines,
    "demo": demo_output,
    "demo-summary": demo_summary,
    "speed": speed,
    "demo-settings": demo_settings,
    "artifact": artifact,
    "banded": banded,
    **{"-".join(name): functools.partial(study_tables, *name) for name in STUDIES},
}


def rendered(page: str) -> str:
    """A page with every block between <!-- generated: NAME --> and <!-- end --> made anew."""

    def block(match: re.Match) -> str:
        return f"<!-- generated: {match[1]} -->\n{BLOCKS[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- generated: ([\w-]+) -->\n.*?<!-- end -->", block, page, flags=re.S)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        adopt(Path(sys.argv[1]).absolute())
    for page in PAGES:
        page.write_text(rendered(page.read_text()))
    PICTURE.write_text(demo_picture(DEMO))
