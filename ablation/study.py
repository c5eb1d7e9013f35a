"""Studies as data: a TOML file -> arms -> trials (arm x seed).

In: a TOML file, a size and a kind of budget. Out: a Matrix, the trials in the order in which
they run. Every name, type and setting is checked here, before anything starts: a setting that
train_gpt.py does not know is refused, and so is one that no Config would take.
"""

import contextlib
import dataclasses
import difflib
import itertools
import math
import re
import shlex
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import tomli

import train_gpt
from ablation import scale
from ablation.records import leaves
from planning.machines import CARDS
from train_gpt import Config, Refusal, read_base, refuse

# Runs start here, so that relative paths of a study are below it
ROOT = Path(__file__).resolve().parents[1]

# Keys of the tables of a study, and the types of their values
STUDY_KEYS = {
    "title": str,
    "source": str,
    "question": str,
    "limits": str,
    "reference": str,
    "seeds": list,
    "metrics": list,
    "show": list,
    "compare": list,
    "env": dict,
    "size": dict,
    "arm": dict,
    "factorial": dict,
    "missing": dict,
    "command": str,
    "corrections": dict,
}
SIZE_KEYS = {
    "ranks": int,
    "jobs": int,
    "threads": int,
    "steps": int,
    "seeds": list,
    "arms": list,
    "time_arms": list,
    "seconds": (int, float),
    "scale": str,
    "gpu": str,
    "equal": str,
    "note": str,
    "env": dict,
}
ARM_KEYS = {"base": str, "published": dict, "command": (str, list), "expect": str, "note": str}
MISSING_KEYS = {"base": str, "score": float, "why": str}

SCALED = "the steps of each arm are its published ones in small; use equal steps"
# The least value of each number of a size
LEAST = {"ranks": 1, "jobs": 1, "threads": 0, "steps": 1, "seconds": 1e-3}

# The runner sets these itself
OWN = {
    "RUN_ID",
    "LOGS_DIR",
    "SEED",
    "CHECKPOINT",
    "EVAL_ONLY",
    "ITERATIONS",
    "MAX_WALLCLOCK_SECONDS",
}
KNOBS = {f.name.upper() for f in train_gpt.KNOBS}
REASONS = dict.fromkeys(KNOBS - OWN, str)
SETTINGS = KNOBS | set(train_gpt.ALIASES) | set(train_gpt.ABSENT)

# Names of arms, sizes and studies, which become names of folders
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.=-]{0,200}")

# More is a mistake, or meant to keep us busy
MAX_TRIALS = 10_000
MAX_STUDY_BYTES = 1 << 20
# tomli takes memory by the square of them
MAX_DOTS = 100

EXAMPLE = "studies/pr989_qat_x_swa.toml"


@dataclass(frozen=True)
class Size:
    """One scale of a study.

    steps, seconds: the budgets of --equal steps and --equal time; where `scale` is set, each arm
        has steps of its own, and seconds are a guess.
    ranks: processes of a run. jobs: trainings side by side.
    threads: per rank; 0: as the machine has.
    arms: which run at this size; empty: all.
    time_arms: the same for --equal time; arms whose steps cost alike have nothing to add there.
    scale: the rule of scale.py by which the published shapes and steps become smaller; empty: none.
    equal: the kind of budget unless told: steps or time.
    gpu: what a rank has for itself, of those that --plan knows; empty: none is meant.
    """

    name: str
    seconds: float
    steps: int = 1
    ranks: int = 1
    jobs: int = 1
    threads: int = 1
    seeds: tuple[int, ...] = ()
    arms: tuple[str, ...] = ()
    time_arms: tuple[str, ...] = ()
    scale: str = ""
    gpu: str = ""
    equal: str = "steps"
    note: str = ""
    env: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """What a TOML file says.

    arms: name -> settings on top of env.
    facts: name -> published figures, expectation, note.
    commands: name -> the variables of the commands that gave its published figures; one for all
        of them, or one for each.
    corrections: variable -> why no arm has the value of these commands.
    factors: of a factorial, name -> levels.
    missing: name of a row that is no arm -> its score, and why it is none.
    metrics are compared; show stands in the table of arms only.
    compare: pairs of arms, besides each arm against the reference.
    """

    path: Path
    title: str
    question: str
    source: str
    limits: str
    seeds: tuple[int, ...]
    reference: str
    metrics: tuple[str, ...]
    show: tuple[str, ...]
    compare: tuple[tuple[str, str], ...]
    env: dict[str, str]
    sizes: dict[str, Size]
    arms: dict[str, dict[str, str]]
    facts: dict[str, dict]
    commands: dict[str, list[dict[str, str]]]
    corrections: dict[str, str]
    factors: dict[str, list[str]]
    missing: dict[str, tuple[float, str]]

    @property
    def name(self) -> str:
        return self.path.stem


# ── Tables of a study ─────────────────────────────────────────────────────────────────────────────
def spelt(value: bool | int | float | str) -> str:
    """A value as an environment variable has it."""
    return str(int(value)) if isinstance(value, bool) else str(value)


def settings(table: dict, where: str) -> dict[str, str]:
    """The environment variables of a TOML table.

    Refusal on a name that train_gpt.py does not know, and on a nested value.
    """
    found = {}
    for key, value in table.items():
        if key in OWN:
            raise Refusal(f"{where}: {key}={value}: is set by ablate.py itself; remove it")
        if key not in SETTINGS:
            close = difflib.get_close_matches(key, SETTINGS - OWN, 1, 0.5)
            meant = ", ".join(close) or "--help"
            raise Refusal(f"{where}: {key}={value}: no such setting; did you mean {meant}?")
        if not isinstance(value, (str, int, float)) or not str(value).isprintable():
            raise Refusal(
                f"{where}: {key}={value}: must be a number, a boolean or a string "
                "without control characters"
            )
        found[key] = spelt(value)
    return found


def typed(table: dict, allowed: dict[str, type | tuple], where: str) -> dict:
    """The table, if it has only these keys with values of these types; else Refusal."""
    for key, value in table.items():
        if key not in allowed:
            raise Refusal(f"{where}: {key}: no such key; choose from {', '.join(sorted(allowed))}")
        if not isinstance(value, allowed[key]) or isinstance(value, bool):
            raise Refusal(f"{where}: {key} = {value!r}: wrong type")
    return table


def split_arm(table: dict, where: str) -> tuple[dict[str, str], dict]:
    """(settings, facts) of one arm: upper-case keys are settings, lower-case ones facts.

    `base` is both: it supplies the settings that the arm does not change, as BASE does.
    """
    if not isinstance(table, dict):
        raise Refusal(f"{where} = {table!r}: must be a table of settings")
    upper = {key: value for key, value in table.items() if key == key.upper()}
    lower = {key: value for key, value in table.items() if key != key.upper()}
    facts = typed(lower, ARM_KEYS, where)
    if "base" in facts:
        refuse("BASE" in upper, f"{where}: base and BASE say the same thing; write base alone")
        upper = {"BASE": facts["base"]} | upper
    return settings(upper, where), facts


def missing_rows(tables: dict, where: str) -> dict[str, tuple[float, str]]:
    """Name -> (score, why it is no arm) of every [missing.NAME].

    Without a `why` of its own, what its `base` lacks.
    """
    rows = {}
    for name, table in tables.items():
        place = f"{where}.{name}"
        if not isinstance(table, dict):
            raise Refusal(f"{place} = {table!r}: must be a table with score and why or base")
        typed(table, MISSING_KEYS, place)
        why = table.get("why") or ", ".join(read_base(table.get("base", "")).lacks)
        refuse(not why or "score" not in table, f"{place}: needs score, and why or base")
        rows[name] = (table["score"], why)
    return rows


def check_factors(factors: dict[str, list], where: str) -> None:
    """Refusal unless each factor has two or more different levels, and not too many in all."""
    for key, levels in factors.items():
        if isinstance(levels, list):
            different = {str(level).lower() for level in levels}
            if 1 < len(levels) == len(different):
                continue
        raise Refusal(
            f"{where}: {key} = {levels!r}: a factor needs a list of two or more different levels"
        )
    if math.prod(map(len, factors.values())) > MAX_TRIALS:
        raise Refusal(
            f"{where}: more than {MAX_TRIALS:,} combinations of {', '.join(factors)}; "
            "leave out levels"
        )


def product_arms(factors: dict[str, list], where: str) -> dict[str, dict[str, str]]:
    """The arms of a full factorial.

    {"qat": [0, 1], "swa": [0, 1]} -> qat-0_swa-0, qat-0_swa-1, qat-1_swa-0, qat-1_swa-1
    """
    check_factors(factors, where)
    if not factors:
        return {}
    arms = {}
    for levels in itertools.product(*factors.values()):
        cell = dict(zip(factors, levels, strict=True))
        name = "_".join(f"{factor}-{level}".lower() for factor, level in cell.items())
        env = {factor.upper(): level for factor, level in cell.items()}
        arms[name] = settings(env, where)
    return arms


def check_equal(equal: str, where: str) -> None:
    """Refusal of another kind of budget than there is."""
    refuse(equal not in ("steps", "time"), f"{where} {equal}: choose steps or time")


def read_size(name: str, table: dict, where: str) -> Size:
    """A [size.NAME]. Refusal on unknown keys, wrong types and numbers out of range."""
    if not isinstance(table, dict):
        raise Refusal(f"{where} = {table!r}: must be a table with steps and seconds")
    if "seconds" not in table or ("steps" in table) == ("scale" in table):
        raise Refusal(
            f"{where}: needs seconds and steps, the budgets of --equal time and --equal steps; "
            "with scale, which gives each arm its own, no steps"
        )
    typed(table, SIZE_KEYS, where)
    lists = {key: tuple(table[key]) for key in ("seeds", "arms", "time_arms") if key in table}
    for key in ("arms", "time_arms"):
        if not all(isinstance(arm, str) for arm in lists.get(key, ())):
            raise Refusal(f"{where}: {key} = {table[key]!r}: must be names of arms")
    env = settings(table.get("env", {}), where)
    size = Size(name=name, **{**table, **lists, "env": env})
    scale.check_rule(size.scale, where)
    check_equal(size.equal, f"{where}: equal =")
    refuse(size.scale and size.equal == "time", f"{where}: equal = time: {SCALED}")
    known = ", ".join(CARDS)
    refuse(size.gpu and size.gpu.lower() not in CARDS, f"{where}: gpu = {size.gpu}: not of {known}")

    for key, least in LEAST.items():
        value = getattr(size, key)
        if not least <= value < 1e9:
            raise Refusal(f"{where}: {key} = {value}: must be {least} or more")
    return size


def published_commands(common: str, facts: dict, where: str) -> list[dict[str, str]]:
    """The variables of each published command of an arm.

    Refusal of one that train_gpt.py would refuse.
    """
    told = facts.get("command", [])
    commands = []
    for command in [told] if isinstance(told, str) else told:
        try:
            words = shlex.split(f"{common} {command}")
            for word in words:
                refuse("=" not in word, f"{word}: no NAME=value; leave it out")
            variables = dict(word.split("=", 1) for word in words)
            Config.from_env(variables)
        except (ValueError, Refusal) as error:
            problem = "; ".join(str(error).splitlines())
            raise Refusal(f"{where}: command: {problem}") from None
        commands.append(variables)
    return commands


# ── The file ──────────────────────────────────────────────────────────────────────────────────────
def parse_toml(text: str) -> dict:
    """The tables of a TOML text. ValueError where it is none, or meant to keep us busy."""
    dots = [line.count(".") for line in text.split("\n")]
    if max(dots) > MAX_DOTS:
        raise ValueError(f"a line with more than {MAX_DOTS} dots")
    data = tomli.loads(text)
    for _ in leaves(data):  # ValueError where it is nested too deeply
        pass
    return data


def read_toml(path: Path) -> dict:
    """The tables of a TOML file.

    Refusal on any other file, and on one that would keep us busy or fill the memory.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_STUDY_BYTES:
            raise Refusal(f"{path}: no plain file of at most 1 MiB; give the path of a study")
        return parse_toml(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise Refusal(
            f"{path}: {error.strerror}; give the path of a study, such as {EXAMPLE}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise Refusal(f"{path}: no valid TOML ({error}); correct it") from None


def study_of(data: dict, path: Path) -> Study:
    """The study that these tables make, with each table checked by itself."""
    typed(data, STUDY_KEYS, str(path))
    sizes = {}
    for name, table in data.get("size", {}).items():
        sizes[name] = read_size(name, table, f"{path}: size.{name}")

    own = {}
    facts = {}
    commands = {}
    for name, table in data.get("arm", {}).items():
        where = f"{path}: arm.{name}"
        own[name], facts[name] = split_arm(table, where)
        commands[name] = published_commands(data.get("command", ""), facts[name], where)
    factors = data.get("factorial", {})
    arms = product_arms(factors, f"{path}: factorial")
    # A table that is named like a cell of the factorial adds to that cell
    arms |= {name: {**arms.get(name, {}), **env} for name, env in own.items()}

    compare = [tuple(pair) if isinstance(pair, list) else () for pair in data.get("compare", ())]
    return Study(
        path=path,
        title=data.get("title", path.stem),
        question=data.get("question", ""),
        source=data.get("source", ""),
        limits=data.get("limits", ""),
        seeds=tuple(data.get("seeds", (1, 2, 3))),
        reference=data.get("reference", next(iter(arms), "")),
        metrics=tuple(data.get("metrics", ("val_bpb", "quant_gap_bpb", "step_ms_median"))),
        show=tuple(data.get("show", ())),
        compare=tuple(compare),
        env=settings(data.get("env", {}), f"{path}: env"),
        sizes=sizes,
        arms=arms,
        facts=facts,
        commands=commands,
        corrections=typed(data.get("corrections", {}), REASONS, f"{path}: corrections"),
        factors={key: list(map(str, levels)) for key, levels in factors.items()},
        missing=missing_rows(data.get("missing", {}), f"{path}: missing"),
    )


def arms_named(study: Study) -> set[str]:
    """The arms that the reference, the comparisons and the sizes name."""
    sides = [study.reference, *itertools.chain(*study.compare)]
    for size in study.sizes.values():
        sides += size.arms + size.time_arms
    return {str(side).partition(":")[0] for side in sides}


def alike(names: Iterable[str]) -> list[tuple[str, str]]:
    """The pairs of names that differ in upper and lower case alone."""
    pairs = itertools.combinations(names, 2)
    return [(name, other) for name, other in pairs if name.lower() == other.lower()]


def is_pair(pair: tuple) -> bool:
    return len(pair) == 2 and all(isinstance(side, str) for side in pair)


def contradictions(study: Study) -> Iterator[str]:
    """What is wrong with a study as a whole, although each of its tables is well formed."""
    sizes = study.sizes.values()
    seeds = [seed for group in (study, *sizes) for seed in group.seeds]
    unknown = arms_named(study) - study.arms.keys()

    if not all(is_pair(pair) for pair in study.compare):
        yield "compare: needs pairs of arms"
    if not sizes:
        yield "no [size.NAME]; give at least one"
    if len(study.arms) < 2:
        yield "fewer than two arms; add [arm.NAME] or [factorial]"
    if not all(type(seed) is int and seed >= 0 for seed in seeds):
        yield "seeds must be whole numbers, 0 or more"
    if not all(isinstance(name, str) for name in study.metrics + study.show):
        yield "metrics and show must be names of figures of result.json"
    if any(len(set(size.arms)) < len(size.arms) for size in sizes):
        yield "an arm stands twice in a size"
    if unknown:
        yield f"no such arm: {', '.join(sorted(unknown))}"
    if not all(NAME.fullmatch(name) for name in (*study.arms, *study.sizes)):
        yield "names may hold letters, digits and _ . = - only"
    # their runs would share a folder where a disk takes both for the same
    for name, other in [*alike(study.arms), *alike(study.sizes)]:
        yield f"{name} and {other} differ in case alone; rename one"
    if not NAME.fullmatch(study.name):
        yield ("its file name, which names the folder of its runs, must be such a name; rename it")


def read_study(path: Path) -> Study:
    """The study in a TOML file.

    Refusal on anything unknown, mistyped or missing. Whether a Config takes the settings is
    checked by matrix.
    """
    study = study_of(read_toml(path), path)
    for problem in contradictions(study):
        raise Refusal(f"{path}: {problem}")
    return study


# ── Trials: one run each, and which of them share a training ──────────────────────────────────────
@dataclass(frozen=True)
class Trial:
    """One run: an arm with a seed.

    env: all its settings, as environment variables.
    donor: the trial whose checkpoint it exports or scores again; None: it trains.
    """

    arm: str
    seed: int
    folder: Path
    env: dict[str, str]
    cfg: Config
    donor: str | None = None

    @property
    def id(self) -> str:
        return self.folder.name


@dataclass(frozen=True)
class Matrix:
    """A study at one size and one kind of budget (equal: steps or time)."""

    study: Study
    size: Size
    equal: str
    folder: Path
    arms: tuple[str, ...]
    trials: list[Trial]

    def command(self) -> str:
        """What a user types to make these runs (in the default folder)."""
        words = ["python ablate.py run", from_root(self.study.path)]
        words += ["--size", self.size.name, "--equal", self.equal]
        seeds = tuple(dict.fromkeys(trial.seed for trial in self.trials))
        if seeds != (self.size.seeds or self.study.seeds):
            words += ["--seeds", ",".join(map(str, seeds))]
        return " ".join(words)

    def budget(self) -> str:
        """What each training gets, in words."""
        if self.equal == "time":
            return f"{self.size.seconds:g} s of training"
        steps = sorted({trial.cfg.iterations for trial in self.trials})
        return f"{steps[0]} steps" if len(steps) == 1 else f"{steps[0]} to {steps[-1]} steps"

    def groups(self) -> list[list[Trial]]:
        """Each training with the trials that share it."""
        groups = {trial.id: [trial] for trial in self.trials if trial.donor is None}
        for trial in self.trials:
            if trial.donor is not None:
                groups[trial.donor].append(trial)
        return list(groups.values())


def from_root(path: Path) -> str:
    """The path as a run sees it: relative to the repository where it lies in it."""
    path = path.absolute()
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def budget(size: Size, equal: str) -> dict[str, str]:
    """The settings that give all arms the same number of steps, or the same time."""
    if equal == "steps":
        return {"ITERATIONS": str(size.steps), "MAX_WALLCLOCK_SECONDS": "0"}
    return {"MAX_WALLCLOCK_SECONDS": str(size.seconds)}


def arm_settings(study: Study, size: Size, arm: str, equal: str) -> dict[str, str]:
    """What this size and budget make of an arm, on top of the study's settings."""
    own = {**size.env, **study.arms[arm], **budget(size, equal)}
    if not size.scale:
        return own

    refuse(equal == "time", f"--equal time: size {size.name}: {SCALED}")
    # what the size says wins over the rule, as it does over no arm of the published shapes
    where = f"{study.path}: arm {arm}"
    steps = study.facts.get(arm, {}).get("published", {}).get("steps")
    refuse(not steps, f"{where}: no published steps, which size {size.name} scales; add them")
    with renamed(where):
        cfg = Config.from_env({**study.env, **study.arms[arm]})
    small = scale.scaled(cfg, round(sum(steps) / len(steps)))
    small |= {"MAX_WALLCLOCK_SECONDS": "0"}
    return {**study.arms[arm], **small, **size.env, **scale.data(size.env, cfg, small)}


@contextlib.contextmanager
def renamed(where: str) -> Iterator[None]:
    """Refusals of what is done inside say where it stands."""
    try:
        yield
    except Refusal as refusal:
        raise Refusal([f"{where}: {problem}" for problem in refusal.problems]) from None


def new_trial(study: Study, env: dict[str, str], arm: str, seed: int, folder: Path) -> Trial:
    """A trial that trains. env: of size and budget. Refusal where no Config takes its settings."""
    name = f"{arm}-s{seed}"
    whole = {**study.env, **env, "SEED": str(seed), "RUN_ID": name, "LOGS_DIR": from_root(folder)}
    with renamed(f"{study.path}: arm {arm}"):
        cfg = Config.from_env(whole)
    return Trial(arm, seed, folder / name, whole, cfg)


def share(trial: Trial, donor: Trial) -> Trial:
    """The trial as one that starts from the donor's checkpoint.

    What it would inherit from that checkpoint must not replace a default of its own, so each
    setting that differs is given.
    """
    given = {
        name.upper(): spelt(value)
        for name, value in trial.cfg.knobs("grid", "export", "size", "eval").items()
        if getattr(donor.cfg, name) != value
    }
    given["CHECKPOINT"] = from_root(donor.folder / "checkpoint.bin")
    return dataclasses.replace(trial, env=trial.env | given, donor=donor.id)


def refuse_twins(study: Study, trials: list[Trial]) -> None:
    """Refusal of two arms of one seed that have the same settings: they would be one run, twice."""
    first: dict[tuple, str] = {}
    for trial in trials:
        same = (trial.cfg.digest(), trial.cfg.data_path, trial.cfg.tokenizer_path)
        twin = first.setdefault(same, trial.arm)
        if twin != trial.arm:
            raise Refusal(
                f"{study.path}: arms {twin} and {trial.arm} have the same settings; "
                "change or remove one"
            )


def matrix(
    study: Study, size: str, equal: str, seeds: tuple[int, ...] = (), out: Path | None = None
) -> Matrix:
    """All trials, seed by seed (A B A B, so that drift of the machine hits all arms alike).

    equal: empty: the size's. Arms whose training settings agree (Config.training_scopes) share one
    training. Refusal on a setting that no Config takes: everything is checked here, before anything
    starts.
    """
    if size not in study.sizes:
        raise Refusal(f"{study.path}: no size {size}; choose from {', '.join(study.sizes)}")
    chosen = study.sizes[size]
    equal = equal or chosen.equal
    folder = (out or ROOT / "logs/runs" / study.name / f"{size}-{equal}").absolute()
    seeds = seeds or chosen.seeds or study.seeds
    arms = chosen.arms or tuple(study.arms)
    if equal == "time" and chosen.time_arms:
        arms = chosen.time_arms
    if len(arms) * len(seeds) > MAX_TRIALS:
        raise Refusal(
            f"{study.path}: {len(arms)} arms with {len(seeds)} seeds: over {MAX_TRIALS:,} trials; "
            "leave some out"
        )

    trials = []
    donors: dict[tuple, Trial] = {}
    for seed in seeds:
        for arm in arms:
            env = arm_settings(study, chosen, arm, equal)
            trial = new_trial(study, env, arm, seed, folder)
            training = (trial.cfg.digest(*trial.cfg.training_scopes), trial.cfg.data_path)
            donor = donors.setdefault(training, trial)
            trials.append(trial if donor.arm == arm else share(trial, donor))
        refuse_twins(study, trials[-len(arms) :])

    if not trials or len({trial.id for trial in trials}) < len(trials):
        raise Refusal(f"{study.path}: no seed, or a seed stands there twice")
    return Matrix(study, chosen, equal, folder, arms, trials)


def with_pairs(made: Matrix, pairs: list[str]) -> Matrix:
    """The matrix with more comparisons, each "A,B" for B - A. Refusal for one that it lacks."""
    compare = list(made.study.compare)
    for text in pairs:
        sides = tuple(text.split(","))
        if len(sides) != 2:
            raise Refusal(f"--pair {text}: give two arms, as in --pair {','.join(made.arms[:2])}")
        for side in sides:
            arm = side.partition(":")[0]
            if arm not in made.arms:
                raise Refusal(f"--pair {text}: no arm {arm}; choose from {', '.join(made.arms)}")
        compare.append(sides)
    return dataclasses.replace(made, study=dataclasses.replace(made.study, compare=tuple(compare)))
