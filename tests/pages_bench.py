"""The measurements of docs/speed.md and docs/faults.md, from logs/bench."""

import json
from pathlib import Path

import bench
from ablation.report import markdown_table
from studies import banded_scoring
from studies import coders as study_of_coders

BENCH = Path(__file__).resolve().parents[1] / "logs" / "bench"


def read(name: str) -> dict:
    return json.loads((BENCH / f"{name}.json").read_text())


def speed() -> str:
    return bench.table(read("reference"), markdown=True)


def demo_in_turn() -> str:
    """`make train` of the demo and of the one before it, in turn on one machine."""
    rows = []
    for name in ("reference_1", "demo_1", "reference_2", "demo_2"):
        run = read(f"demo_in_turn/{name}")
        size = name.partition("_")[0]
        command = "make train" if size == "demo" else "make train SIZE=reference RANKS=2"
        bpb, steps = f"{run['val_bpb']:.4f}", f"{run['steps']:,}"
        rows.append([f"`{command}`", run["seed"], bpb, steps, f"{run['artifact_bytes']:,}"])
    return markdown_table(["in turn", "seed", "BPB", "steps", "artifact, bytes"], rows)


def model_rows() -> str:
    """What techniques of the records add to a pass through the demo's model, forward and back."""
    rows = []
    for row in read("demo")["rows"]:
        if row["name"].startswith("model: "):
            # of pairs: with it over without it
            ratio, low, high = (1 / row[key] for key in ("speedup", "speedup_p90", "speedup_p10"))
            name = row["name"].removeprefix("model: ")
            without, with_it = f"{row['twin_ms']:.1f}", f"{row['ms']:.1f}"
            rows.append([name, without, with_it, f"{ratio:.2f} ({low:.2f} to {high:.2f})"])
    header = ["", "without, ms", "with, ms", "ratio of pairs: median (10 to 90 %)"]
    return markdown_table(header, rows)


def ranks_and_threads() -> str:
    """What 2 cores do with the reference model: the whole step, by ranks, threads, compiler."""
    rows = []
    for name in ("reference", "reference_1x2", "reference_compiled"):
        report = read(name)
        measured = {row["name"]: row for row in report["rows"]}
        step = measured["step, whole"]
        (warm_up,) = [row for key, row in measured.items() if key.startswith("warm-up")]
        rows.append(
            [
                f"`{name}.json`",
                report["world_size"],
                report["threads_per_rank"],
                "yes" if report["compile"] else "no",
                f"{step['ms']:.1f}",
                f"{step['rate']:,.0f}",
                f"{warm_up['ms'] / 1e3:.1f}",
            ]
        )
    header = [
        "logs/bench/",
        "ranks",
        "threads each",
        "compiled",
        "step, ms",
        "tokens/s",
        "warm-up and compile, s",
    ]
    return markdown_table(header, rows)


def artifact_row(run: dict) -> list[str]:
    codes = run["codes"]
    stored = codes["stored_bytes"]
    beside_entropy = 100 * (stored / codes["order0_bytes"] - 1)
    return [
        f"`COMPRESSOR={codes['compressor']}`",
        f"{run['artifact_bytes']:,}",
        f"{stored:,}",
        f"{8 * stored / codes['weights']:.3f}",
        f"{beside_entropy:+.2f} %",
        f"{run['seconds']['quantise and compress']:.2f}",
        f"{run['seconds']['read back']:.2f}",
        f"{run['quantised_val_bpb']:.6f}",
    ]


def artifact() -> str:
    """The demo's checkpoint with every compressor; zstd in frames against one frame."""
    runs = [read(f"artifact_{name}") for name in ("zlib", "lzma", "zstd", "ans")]
    codes = runs[-1]["codes"]
    how = (
        f"{codes['weights']:,} codes, order-0 entropy {codes['order0_bytes']:,} bytes; "
        f"{runs[-1]['device']}, 1 seed; `CHECKPOINT=logs/demo/checkpoint.bin COMPRESSOR=... "
        "EVAL_STRIDE=0 python train_gpt.py` in the environment of the demo"
    )
    header = [
        "",
        "artifact, bytes",
        "codes and scales",
        "bits per weight",
        "against order-0",
        "export, s",
        "read back, s",
        "quantised BPB",
    ]
    table = markdown_table(header, [artifact_row(run) for run in runs])
    (zstd,) = [row for row in read("demo")["rows"] if row["name"] == "compress, zstd 22"]
    frames = (
        f"zstd in frames and in one, on the bench's weights: {zstd['note']}, "
        f"{zstd['ms']:.0f} ms and {zstd['twin_ms']:.0f} ms."
    )
    return f"{how}\n\n{table}\n\n{frames}"


def coders() -> str:
    """Every coder on trained weights; what parts of ours are worth; the codes of a record."""
    report = read("coders")
    tables = [markdown_table(study_of_coders.HEADER_OF_TABLE, study_of_coders.table(report))]

    rows = []
    for row in report["other_k"]:
        brotli, ans = row["bytes"]["brotli"], row["bytes"]["ans"]
        per_weight = f"{8 * (ans - row['rest']) / row['codes']:.3f}"
        difference = f"{100 * (ans / brotli - 1):+.2f} %"
        cells = [row["k"], f"{row['bits']:.3f}", f"{brotli:,}", f"{ans:,}"]
        rows.append([*cells, difference, per_weight])
    header = ["k", "order-0, bits", "brotli", "ans", "ans against brotli", "ans, bits per code"]
    tables.append(f"The last one by k:\n\n{markdown_table(header, rows)}")

    rows = []
    size = report["left_out"]["bytes"]
    for name in filter(None, size):
        rows.append([name, f"{size[name]:,}", f"{100 * (size[name] / size[''] - 1):+.2f} %"])
    table = markdown_table(["`ans` without", "bytes", "more"], rows)
    tables.append(f"The last one without a part of `ans`:\n\n{table}")

    made = report["synthetic"]
    below = 100 * (1 - made["bytes"] / made["order0"])
    tables.append(
        f"On {made['codes']:,} synthetic codes (normal, columns spread by a lognormal of 0.18, "
        f"k = 12.85) one core took {made['encode_seconds']:.1f} s to code and "
        f"{made['decode_seconds']:.1f} s to decode; the stream was {below:.2f} % below the order-0 "
        f"entropy. All of this: {report['device']}, beside other work, 1 seed each."
    )
    return "\n\n".join(tables)


def banded() -> str:
    report = read("banded_scoring")
    how = f"`{report['command']}`, {report['environment']['device']}, 1 thread"
    return f"{how}\n\n{banded_scoring.table(report)}"


def soak() -> str:
    """The hour of kills in words."""
    r = read("soak")
    stops = []
    for how, stop in sorted(r["stops"].items()):
        stops.append(f"{stop['n']} x {how} (all ended within {stop['slowest_seconds']:.0f} s)")
    megabytes = [run["bytes"] / 1e6 for run in r["runs"]]
    orphans = r["ranks_at_work_40_s_after_their_launcher"]
    return (
        f"`python tests/soak.py --seconds 3700`, {r['device']}, {r['ranks']} ranks, "
        f"torch {r['torch']}, beside other work, code {r['code_sha256'][:12]}: "
        f"{len(r['runs'])} runs of the demo's settings of that day with 60 s of training each, "
        f"{r['seconds'] / 60:.0f} minutes, {r['attempts']} launches; "
        f"stopped by {', '.join(stops)}. Every run came to its end. "
        f"Ranks that were still at work 40 s after their launcher had been killed: {orphans}. "
        "They go on to the end of their run, and its lock keeps a second launch away meanwhile. "
        f"Open files of a rank, second half of a launch: {r['open_files_growth']:+d} at most; "
        f"a complete run's folder: {min(megabytes):.1f} to {max(megabytes):.1f} MB, "
        f"six files in each. Resident memory of a rank: {r['peak_rss'] / 1e6:.0f} MB at most."
    )
