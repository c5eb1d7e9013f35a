"""Where bytes are worth most: each part of a trained model quantised alone, on training text.

A part is a tensor or a layer. It is rounded as its run rounds it, at other k of SDClip and at other
bits, while all others stay float; the loss and the bytes of each tell what a byte is worth there.
Checkpoint, grids, rounding, container and scoring are train_gpt.py's. Validation is never read.
"""

import itertools
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch

import train_gpt
from ablation.page import LOOKS, MAX_ROWS, Chart, Lead, Line, Table, html_page, row_figure, styled
from ablation.records import load
from ablation.report import markdown_table
from prepare_data import progress
from train_gpt import Config, Grid, Parts, Refusal, Run, Score, Split, State, Trainer, refuse

# The part of all tensors that ship as floats
FLOATS = "all floats"
PLANNED = "as planned"
K_LESS = "k -10 %"
K_MORE = "k +10 %"
BIT_MORE = "1 bit more"
BIT_LESS = "1 bit less"
K_FACTORS = {K_LESS: 0.9, K_MORE: 1.1}
BIT_STEPS = {BIT_MORE: 1, BIT_LESS: -1}


# ── Text ──────────────────────────────────────────────────────────────────────────────────────────
class HeldOut(NamedTuple):
    """The end of the training text, as train_gpt.score takes a Validation."""

    tokens: torch.Tensor  # (n + 1,) int32
    target_bytes: torch.Tensor  # (n,)
    n: int
    tilt: None = None


def held_out(cfg: Config, run: Run, split: Split, targets: int) -> HeldOut:
    """The last targets of the training text; their bytes by the tokenizer's table."""
    n = min(targets, split.tokens - 1)
    tokens = split.take(split.tokens - n - 1, n + 1)
    sizes = torch.from_numpy(train_gpt.ByteTable(cfg).count(tokens))
    return HeldOut(torch.from_numpy(tokens).int().to(run.device), sizes, n)


def share_read(trainer: Trainer, ranks: SimpleNamespace) -> float:
    """Which part of the held-out tokens a training on these ranks has read.

    The rows of every step are those that its loader ordered.
    """
    cfg, split = trainer.cfg, trainer.split
    first = split.tokens - trainer.val.n
    read = np.zeros(trainer.val.n, bool)
    steps = [train_gpt.step_shape(cfg, ranks, length) for length in trainer.lengths]
    step = 0
    for shape, alike in itertools.groupby(steps):
        make = train_gpt.ORDERS[cfg.loader]
        order = make(split, shape, range(shape.step_rows), step)
        for _ in alike:
            for start in order.starts(step):
                begin = start % split.tokens - first
                read[max(begin, 0) : max(begin + shape.length + 1, 0)] = True
            step += 1
    return float(read.mean())


# ── The run ───────────────────────────────────────────────────────────────────────────────────────
class Silent(Run):
    """A run that leaves no records: it only measures."""

    def open_folder(self, cfg: Config) -> None:
        self.dir = Path(cfg.logs_dir)

    def log(self, text: str) -> None:
        pass


@dataclass
class Model:
    """The trained weights of a run, how they ship, and what scores them."""

    trainer: Trainer
    weights: State  # to be shipped, pruned, fp32
    hessians: dict
    read: float  # of the held-out text, by the training

    def score(self, parts: dict[str, Parts]) -> Score:
        """The weights with these parts in place of theirs."""
        return self.trainer.score_weights(self.weights | train_gpt.shipped_state(parts))


def read_model(folder: Path, targets: int, scratch: str) -> Model:
    """The model of a run folder, with the held-out text. Refusal where it has no checkpoint."""
    result = load(folder)
    path = Path(result.get("checkpoint") or folder / train_gpt.CHECKPOINTS[0])
    lost = "the weights before quantisation are needed; give a run whose checkpoint.bin is there"
    refuse(not path.is_file(), f"{path}: no such file; {lost}")
    # what the run was told wins over the checkpoint, which may be of a training with other exports
    config = result["config"]
    given = frozenset(name.upper() for name in config)
    source = {"checkpoint": str(path), "eval_only": "", "resume": False, "base": ""}
    place = {"logs_dir": scratch, "run_id": "", "given": given}
    try:
        cfg = Config(**config | source | place)
    except TypeError as error:
        raise Refusal(
            f"{folder}: made by another script ({error}); use ablate.py of its checkout"
        ) from None

    run = Silent(cfg)
    saved = train_gpt.saved_training(cfg, run)
    cfg = train_gpt.complete_settings(cfg, path, saved)
    split = Split(cfg, "train")
    text = held_out(cfg, run, split, targets)
    model = train_gpt.build_model(cfg, run, train_gpt.choose_attention(cfg, run))
    plan = train_gpt.export_plan(cfg, model)
    trainer = Trainer(cfg, run, model, plan, split, text)
    trainer.restore(*saved)
    trained = train_gpt.collect_averages(cfg, run, trainer)
    if cfg.gptq_enabled:
        model.load_state_dict(trained.final)
        trained.hessians = trainer.hessians(cfg.gptq_calibration_batches)
    ranks = SimpleNamespace(
        world=result["world_size"], rank=0, cuda=not result["device"].startswith("CPU ")
    )
    weights = train_gpt.prune(cfg, trained.final, cfg.prune_pct)
    return Model(trainer, weights, trained.hessians, share_read(trainer, ranks))


# ── Parts and their variants ──────────────────────────────────────────────────────────────────────
def parts_of(plan: dict, by: str) -> dict[str, list[str]]:
    """Part -> names of its tensors with codes; the last part is that of all floats."""
    found: dict[str, list[str]] = {}
    floats = []
    for name, how in plan.items():
        words = name.split(".")
        layer = ".".join(words[:2]) if words[0] == "blocks" else words[0]
        if not isinstance(how, Grid):
            floats.append(name)
        else:
            found.setdefault(name if by == "tensor" else layer, []).append(name)
    refuse(not found, "nothing of this run is quantised: lower KEEP_FLOAT_MAX_NUMEL, or QUANT_BITS")
    return found | {FLOATS: floats}


def other_k(factor: float) -> Callable[[Grid], Grid]:
    """Grids of SDClip with another k; the others as they are."""
    return lambda grid: grid._replace(sigmas=grid.sigmas * factor)


def other_bits(bits: int) -> Callable[[Grid], Grid]:
    return lambda grid: grid._replace(bits=bits)


def more_bits(step: int) -> Callable[[Grid], Grid]:
    return lambda grid: grid._replace(bits=grid.bits + step)


def changes(bits: tuple[int, ...]) -> dict[str, Callable[[Grid], Grid]]:
    """Variant -> what becomes of a grid."""
    found = {name: other_k(factor) for name, factor in K_FACTORS.items()}
    found |= {name: more_bits(step) for name, step in BIT_STEPS.items()}
    return found | {f"{n} bits": other_bits(n) for n in bits}


def variants(plan: dict, names: list[str], bits: tuple[int, ...]) -> Iterator[tuple[str, dict]]:
    """(variant, plan) of each change that makes these tensors others, and that a grid can be."""
    grids = {name: plan[name] for name in names if isinstance(plan[name], Grid)}
    for variant, altered in changes(bits).items():
        changed = {name: altered(grid) for name, grid in grids.items()}
        possible = all(grid.bits in train_gpt.CODE_BITS for grid in changed.values())
        if possible and changed != grids:
            yield variant, changed


class Rounding:
    """Rounds tensors as the run does, all at once or some of them, and counts their bytes."""

    def __init__(self, model: Model):
        self.model = model
        self.cfg = model.trainer.cfg
        self.plan = model.trainer.plan
        self.whole = train_gpt.quantised(self.cfg, model.weights, self.plan, model.hessians)

    def bytes(self, parts: dict[str, Parts]) -> int:
        """Of these tensors, compressed by themselves as the artifact is, without its settings."""
        tensors = {}
        for name, tensor in parts.items():
            for part, t in tensor.items():
                tensors[train_gpt.part_name(name, part)] = t
        level = self.cfg.compress_level
        return len(train_gpt.encode_container(tensors, {}, self.cfg.compressor, level))

    def planned(self, names: list[str]) -> dict[str, Parts]:
        """These tensors as they are in the whole."""
        return {name: self.whole[name] for name in names}

    def some(self, plan: dict) -> dict[str, Parts]:
        """The tensors of this plan; corrected are those that are in the whole."""
        parts = {}
        for corrected in (False, True):
            names = [name for name in plan if ("left" in self.whole[name]) == corrected]
            if names:
                cfg = train_gpt.without_part(self.cfg, "lqer_enabled", corrected)
                state = {name: self.model.weights[name] for name in names}
                parts |= train_gpt.quantised(cfg, state, plan, self.model.hessians)
        return parts


# ── Measuring ─────────────────────────────────────────────────────────────────────────────────────
class Measured(NamedTuple):
    score: Score
    bytes: int


@dataclass
class Row:
    """A part: what each variant of it scores alone, and the bytes of that."""

    name: str
    weights: int
    bits: str
    k: str
    found: dict[str, Measured] = field(default_factory=dict)  # by variant

    def neighbours(self) -> tuple[str, str]:
        """A finer and a coarser variant: another bit, which tells more; else another k."""
        finer = BIT_MORE if BIT_MORE in self.found else K_LESS
        coarser = BIT_LESS if BIT_LESS in self.found else K_MORE
        return finer, coarser


class Change(NamedTuple):
    """A difference of two scores in mBPB, and half of its 95 % interval."""

    mbpb: float
    margin: float

    def __str__(self) -> str:
        return f"{self.mbpb:+.3f} ± {self.margin:.3f}"


def change(on: Score, off: Score) -> Change:
    """What the first scores above the second."""
    margin = train_gpt.paired_margin(on.blocks, off.blocks, math.log(2) * on.bytes)
    return Change(1e3 * (on.bpb - off.bpb), 1e3 * margin)


@dataclass
class Sensitivity:
    """All that was measured of a run."""

    folder: Path
    text: HeldOut
    read: float  # of the text, by the training
    floats: Score  # nothing quantised
    whole: Measured
    rows: list[Row]
    artifact: str  # how the whole compares with the file that the run has shipped
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def damage(self, measured: Measured) -> Change:
        return change(measured.score, self.floats)

    def worth(self, row: Row) -> list[Change | None]:
        """mBPB that 1 % of the artifact's bytes more gain there, and that 1 % less cost.

        None where the neighbour does not take more, or less, bytes.
        """
        found = []
        for variant, sign in zip(row.neighbours(), (1, -1), strict=True):
            planned, other = row.found[PLANNED], row.found.get(variant)
            moved = sign * (other.bytes - planned.bytes) if other else 0
            if moved <= 0:
                found.append(None)
                continue
            difference = change(planned.score, other.score)
            percents = 100 * moved / self.whole.bytes
            found.append(Change(sign * difference.mbpb / percents, difference.margin / percents))
        return found

    def sum_of_parts(self) -> Change:
        """The sum of the single damages minus that of the whole."""
        singles = [row.found[PLANNED].score.blocks for row in self.rows]
        rest = (len(singles) - 1) * np.array(self.floats.blocks)
        together = np.sum(singles, axis=0) - rest
        units = math.log(2) * self.floats.bytes
        margin = train_gpt.paired_margin(together, self.whole.score.blocks, units)
        return Change(1e3 * (sum(together) - sum(self.whole.score.blocks)) / units, 1e3 * margin)


def spelt(values: list) -> str:
    """Different values, in order."""
    return ", ".join(f"{value:g}" for value in sorted(set(values)))


def new_row(model: Model, name: str, names: list[str]) -> Row:
    grids = [how for how in map(model.trainer.plan.get, names) if isinstance(how, Grid)]
    bits = spelt([grid.bits for grid in grids]) or "-"
    k = spelt([grid.sigmas for grid in grids if grid.clip == "sigma"]) or "-"
    return Row(name, sum(model.weights[n].numel() for n in names), bits, k)


def shipped_file(folder: Path, blob: bytes) -> str:
    """Whether these are the bytes that the run has shipped, and if not, why it may be."""
    path = folder / "artifact.bin"
    if not path.is_file():
        return f"{path} is not there to compare"
    if path.read_bytes() == blob:
        return f"the whole is {path}, byte for byte"
    return f"the whole is not {path}: FIT_TO_CAP changed its grids, or other code or ranks made it"


Job = tuple[Row, str, Callable[[], dict[str, Parts]]]  # a part, a variant, what rounds it


def jobs_of(model: Model, rounding: Rounding, by: str, bits: tuple[int, ...]) -> list[Job]:
    """All that is to be scored of parts; of each first what is planned."""
    plan = model.trainer.plan
    jobs: list[Job] = []
    for name, names in parts_of(plan, by).items():
        row = new_row(model, name, names)
        jobs.append((row, PLANNED, partial(rounding.planned, names)))
        for variant, changed in variants(plan, names, bits):
            jobs.append((row, variant, partial(rounding.some, changed)))
    return jobs


def score_all(folder: Path, model: Model, by: str, bits: tuple[int, ...]) -> Sensitivity:
    """Scores the float weights, the whole, and every part alone in every variant."""
    rounding = Rounding(model)
    jobs = jobs_of(model, rounding, by, bits)
    with progress(f"sensitivity by {by}", "scores", len(jobs) + 2) as state:

        def score(parts: dict[str, Parts]) -> Score:
            found = model.score(parts)
            state.advance()
            return found

        blob = train_gpt.encode_artifact(rounding.cfg, rounding.whole)
        floats = score({})
        whole = Measured(score(rounding.whole), len(blob))
        for row, variant, rounded in jobs:
            parts = rounded()
            row.found[variant] = Measured(score(parts), rounding.bytes(parts))
    rows = list({id(row): row for row, _, _ in jobs}.values())
    artifact = shipped_file(folder, blob)
    return Sensitivity(folder, model.trainer.val, model.read, floats, whole, rows, artifact)


def measure(folder: Path, by: str, bits: tuple[int, ...], targets: int) -> Sensitivity:
    """All of it, with the seconds. Refusal where the run cannot be measured."""
    wall, cpu = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as scratch:
        found = score_all(folder, read_model(folder, targets, scratch), by, bits)
    found.seconds = time.perf_counter() - wall
    found.cpu_seconds = time.process_time() - cpu
    return found


# ── Words, table, chart ───────────────────────────────────────────────────────────────────────────
WORTH = ("1 % more gains, mBPB", "1 % less costs, mBPB")


def table_of(found: Sensitivity) -> Table:
    """A row per part: its loss above float alone, and bytes, in every variant; and their worth."""
    shown = list(dict.fromkeys(variant for row in found.rows for variant in row.found))
    header = ["part", "weights", "bits", "k"]
    for variant in shown:
        header += [f"{variant}, mBPB", "bytes"]
    lines = []
    for row in found.rows:
        line = [row.name, f"{row.weights:,}", row.bits, row.k]
        for variant in shown:
            one = row.found.get(variant)
            line += [found.damage(one), f"{one.bytes:,}"] if one else [None, None]
        lines.append([*line, *found.worth(row)])
    return [*header, *WORTH], lines


def best(found: Sensitivity) -> list[Line]:
    """Where more bytes gain most, where fewer cost most and least: what the intervals bear out."""
    gains, costs = {}, {}
    for row in found.rows:
        gain, cost = found.worth(row)
        if gain:
            gains[row.name] = gain
        if cost:
            costs[row.name] = cost
    lines = [
        most("lower", "More bytes gain most in", "1 % more gains", gains),
        most("higher", "Fewer bytes cost most in", "1 % less costs", costs),
    ]
    if costs:
        name = min(costs, key=lambda part: costs[part].mbpb + costs[part].margin)
        cheapest = f"(1 % less costs {costs[name]} mBPB)."
        lines.append(Line("open", "Fewer bytes cost least in", name, cheapest))
    return [line for line in lines if line]


def most(look: str, question: str, how: str, worths: dict[str, Change]) -> Line | None:
    """Which part has the largest worth, at the lower end of its interval; None of none."""
    if not worths:
        return None
    least = {name: worth.mbpb - worth.margin for name, worth in worths.items()}
    name = max(least, key=least.get)
    if least[name] <= 0:
        return Line("open", question, "no part for sure", "(score more: --tokens).")
    return Line(look, question, name, f"({how} {worths[name]} mBPB).")


def sum_rule(found: Sensitivity) -> str:
    """Whether the single damages add up to that of the whole."""
    off = found.sum_of_parts()
    whole = found.damage(found.whole)
    verdict = "not distinguishable"
    if abs(off.mbpb) > off.margin:
        verdict = "the sum is more" if off.mbpb > 0 else "the sum is less"
    return (
        f"Sum rule: the parts alone cost {whole.mbpb + off.mbpb:+.3f} mBPB in sum, all together "
        f"{whole} mBPB: {verdict} ({off} mBPB)."
    )


def remarks_of(found: Sensitivity) -> list[str]:
    alone = sum(row.found[PLANNED].bytes for row in found.rows)
    return [
        f"Scored on the last {found.text.n:,} tokens of the training text "
        f"({found.floats.bytes:,} bytes), of which training has read {found.read:.1%}; fixed "
        f"windows; float weights {found.floats.bpb:.6f} BPB, all quantised "
        f"{found.whole.score.bpb:.6f} BPB.",
        f"Each part compressed alone: {alone:,} bytes in sum; the artifact has "
        f"{found.whole.bytes:,}; {found.artifact}.",
        "± is half of a 95 % interval of paired differences. The worth of bytes is that of a bit "
        "more and of a bit less, or of k -10 % and k +10 % where a grid cannot have that bit.",
        f"Took {found.seconds:.1f} s ({found.cpu_seconds:.1f} s of CPU).",
    ]


def worth_chart(found: Sensitivity) -> Chart:
    """What a percent of the bytes is worth in each part, those of most worth on top."""
    known = [row for row in found.rows if any(found.worth(row))]

    def most(row: Row) -> float:
        return max(worth.mbpb for worth in found.worth(row) if worth)

    known = sorted(known, key=most, reverse=True)[:MAX_ROWS]
    figure, ax = row_figure([row.name for row in known], "mBPB per 1 % of the artifact's bytes")
    looks = (LOOKS["lower"], LOOKS["higher"])
    for side, (text, look) in enumerate(zip(WORTH, looks, strict=True)):
        points = [(y + 0.2 * side - 0.1, found.worth(row)[side]) for y, row in enumerate(known)]
        points = [(y, worth) for y, worth in points if worth]
        x = [worth.mbpb for _, worth in points]
        margins = [worth.margin for _, worth in points]
        drawn = {"color": look.colour, "marker": look.marker, "linestyle": "none", "capsize": 2}
        ax.errorbar(x, [y for y, _ in points], xerr=margins, label=text, **drawn)
    ax.axvline(0, color="#444444", linewidth=0.8)
    ax.legend(fontsize=8, frameon=False)
    more = f"; the first {MAX_ROWS} of {len(found.rows)}" if len(found.rows) > MAX_ROWS else ""
    return Chart(
        figure,
        "What 1 % of the artifact's bytes more would gain in a part, and 1 % less would cost, with "
        f"95 % intervals{more}. Where a gain lies right of another part's cost, bytes are better "
        "moved from there to here.",
    )


def damage_chart(found: Sensitivity) -> Chart:
    """What each part costs alone."""
    rows = sorted(found.rows, key=lambda row: -found.damage(row.found[PLANNED]).mbpb)[:MAX_ROWS]
    figure, ax = row_figure([row.name for row in rows], "mBPB above float weights")
    costs = [found.damage(row.found[PLANNED]) for row in rows]
    bars = {"color": LOOKS["higher"].colour, "xerr": [cost.margin for cost in costs], "capsize": 2}
    ax.barh(range(len(rows)), [cost.mbpb for cost in costs], 0.7, **bars)
    return Chart(figure, "What each part costs when it alone is quantised, with 95 % intervals.")


def write_sensitivity(folder: Path, by: str, bits: tuple[int, ...], targets: int) -> str:
    """Measures, writes sensitivity.html into the folder, and returns what to print."""
    found = measure(folder, by, bits, targets)
    table = table_of(found)
    lines = best(found)
    with styled():
        charts = [worth_chart(found), damage_chart(found)]
    title = f"Sensitivity of {folder.name} by {by}"
    lead = Lead("Where are bytes worth most?", sum_rule(found), lines, remarks_of(found), charts)
    page = html_page(title, [], {"Every part alone": table}, [], lead)
    path = folder / "sensitivity.html"
    train_gpt.write_atomic(path, page.encode())
    told = [" ".join((line.before, line.verdict, line.after)) for line in lines]
    return "\n".join(
        [markdown_table(*table), "", *told, sum_rule(found), *remarks_of(found), f"page: {path}"]
    )
