"""Studies as data: STUDY.toml -> arms -> trials (arm x seed), every setting checked before anything starts."""

import difflib
import itertools
import math
import os
import re
import stat
import sys
from dataclasses import dataclass, field
from pathlib import Path

import tomli

import train_gpt
from ablation.records import leaves
from train_gpt import Config, Refusal

ROOT = (
    Path(__file__).resolve().parents[1]
)  # runs start here, so that relative paths of a study are below it

STUDY_KEYS = {
    **dict.fromkeys(("title", "source", "question", "limits", "reference"), str),
    **dict.fromkeys(("seeds", "metrics", "show", "compare"), list),
    **dict.fromkeys(("env", "size", "arm", "factorial"), dict),
}

SIZE_KEYS = {
    **dict.fromkeys(("ranks", "jobs", "threads", "steps"), int),
    **dict.fromkeys(("seeds", "arms", "time_arms"), list),
    "seconds": (int, float),
    "note": str,
    "env": dict,
}

ARM_KEYS = {"published": dict, "expect": str, "note": str}

OWN = {
    "RUN_ID",
    "LOGS_DIR",
    "SEED",
    "CHECKPOINT",
    "EVAL_ONLY",
    "ITERATIONS",
    "MAX_WALLCLOCK_SECONDS",
}  # the runner sets these

SETTINGS = (
    {f.name.upper() for f in train_gpt.KNOBS} | set(train_gpt.ALIASES) | set(train_gpt.UNSUPPORTED)
)

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.=-]{0,200}")

MAX_TRIALS = 10_000  # of a study: more is a mistake, or meant to keep us busy


@dataclass(frozen=True)
class Size:
    """One scale of a study. steps and seconds are the budgets of --equal steps and --equal time."""

    name: str
    steps: int
    seconds: float
    ranks: int = 1
    jobs: int = 1  # trainings side by side
    threads: int = 1  # per rank; 0: as the machine has
    seeds: tuple[int, ...] = ()
    arms: tuple[str, ...] = ()  # empty: all
    time_arms: tuple[
        str, ...
    ] = ()  # of --equal time: arms whose steps cost alike have nothing to add; empty: arms
    note: str = ""
    env: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """What a TOML file says. arms: name -> settings on top of env; facts: name -> published figures, expectation, note.
    metrics are compared; show stands in the table of arms only."""

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
    factors: dict[str, list[str]]

    @property
    def name(self) -> str:
        return self.path.stem


def settings(table: dict, where: str) -> dict[str, str]:
    """The environment variables of a TOML table. Refusal on a name that train_gpt.py does not know, or a nested value."""
    found = {}
    for key, value in table.items():
        if key not in SETTINGS or key in OWN:
            close = difflib.get_close_matches(key, SETTINGS - OWN, 1, 0.5)
            unknown = f"no such setting; did you mean {', '.join(close) or '--help'}?"
            raise Refusal(
                f"{where}: {key}={value}: {'is set by ablate.py itself; remove it' if key in OWN else unknown}"
            )
        if not isinstance(value, (str, int, float)) or not str(value).isprintable():
            raise Refusal(
                f"{where}: {key}={value}: must be a number, a boolean or a string without control characters"
            )
        found[key] = str(int(value)) if isinstance(value, bool) else str(value)
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
    """(settings, facts) of one arm: upper-case keys are settings, lower-case ones facts."""
    if not isinstance(table, dict):
        raise Refusal(f"{where} = {table!r}: must be a table of settings")
    facts = typed({k: v for k, v in table.items() if k != k.upper()}, ARM_KEYS, where)
    return settings({k: v for k, v in table.items() if k == k.upper()}, where), facts


def product_arms(factors: dict[str, list], where: str) -> dict[str, dict[str, str]]:
    """The arms of a full factorial: {"qat": [0, 1], "swa": [0, 1]} -> qat-0_swa-0, qat-0_swa-1, ..."""
    for key, levels in factors.items():
        if not isinstance(levels, list) or not 1 < len(levels) == len(
            {str(level).lower() for level in levels}
        ):
            raise Refusal(
                f"{where}: {key} = {levels!r}: a factor needs a list of two or more different levels"
            )
    if math.prod(map(len, factors.values())) > MAX_TRIALS:
        raise Refusal(
            f"{where}: more than {MAX_TRIALS:,} combinations of {', '.join(factors)}; leave out levels"
        )
    cells = itertools.product(
        *([(key, level) for level in levels] for key, levels in factors.items())
    )
    return (
        {
            "_".join(f"{k}-{v}".lower() for k, v in cell): settings(
                {k.upper(): v for k, v in cell}, where
            )
            for cell in cells
        }
        if factors
        else {}
    )


def read_size(name: str, table: dict, where: str) -> Size:
    if not isinstance(table, dict) or not {"steps", "seconds"} <= table.keys():
        raise Refusal(
            f"{where}: needs steps and seconds, the budgets of --equal steps and --equal time"
        )
    typed(table, SIZE_KEYS, where)
    lists = {key: tuple(table[key]) for key in ("seeds", "arms", "time_arms") if key in table}
    for key in ("arms", "time_arms"):
        if not all(isinstance(arm, str) for arm in lists.get(key, ())):
            raise Refusal(f"{where}: {key} = {table[key]!r}: must be names of arms")
    size = Size(name=name, **{**table, **lists, "env": settings(table.get("env", {}), where)})
    for key, least in {"ranks": 1, "jobs": 1, "threads": 0, "steps": 1, "seconds": 1e-3}.items():
        if not least <= getattr(size, key) < 1e9:
            raise Refusal(f"{where}: {key} = {getattr(size, key)}: must be {least} or more")
    return size


def read_toml(path: Path) -> dict:
    """The tables of a TOML file. Refusal on any other file, and on one that would keep us busy or fill the memory."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > 1 << 20:
            raise Refusal(f"{path}: no plain file of at most 1 MiB; give the path of a study")
        text = path.read_text(encoding="utf-8")
        if (
            max((line.count(".") for line in text.split("\n")), default=0) > 100
        ):  # tomli takes memory by the square of them
            raise ValueError("a line with more than 100 dots")
        data = tomli.loads(text)
        list(leaves(data))  # ValueError where it is nested too deeply
        return data
    except OSError as error:
        raise Refusal(
            f"{path}: {error.strerror}; give the path of a study, such as studies/pr989_qat_x_swa.toml"
        ) from None
    except (ValueError, RecursionError) as error:
        raise Refusal(f"{path}: no valid TOML ({error}); correct it") from None


def read_study(path: Path) -> Study:
    """The study in a TOML file. Refusal on anything unknown, mistyped, missing, or that no Config would take."""
    data = read_toml(path)
    typed(data, STUDY_KEYS, str(path))
    sizes = {
        name: read_size(name, table, f"{path}: size.{name}")
        for name, table in data.get("size", {}).items()
    }
    split = {
        name: split_arm(table, f"{path}: arm.{name}") for name, table in data.get("arm", {}).items()
    }
    arms = product_arms(data.get("factorial", {}), f"{path}: factorial")
    arms |= {
        name: {**arms.get(name, {}), **env} for name, (env, _) in split.items()
    }  # of a cell: its facts
    study = Study(
        path,
        data.get("title", path.stem),
        data.get("question", ""),
        data.get("source", ""),
        data.get("limits", ""),
        tuple(data.get("seeds", (1, 2, 3))),
        data.get("reference", next(iter(arms), "")),
        tuple(data.get("metrics", ("val_bpb", "quant_gap_bpb", "step_ms_median"))),
        tuple(data.get("show", ())),
        tuple(tuple(pair) if isinstance(pair, list) else () for pair in data.get("compare", ())),
        settings(data.get("env", {}), f"{path}: env"),
        sizes,
        arms,
        {name: facts for name, (_, facts) in split.items()},
        {key: list(map(str, levels)) for key, levels in data.get("factorial", {}).items()},
    )
    named = {
        str(side).partition(":")[0]
        for side in itertools.chain(
            [study.reference],
            *study.compare,
            *(scale.arms + scale.time_arms for scale in sizes.values()),
        )
    }
    for problem, message in [
        (
            not all(
                len(pair) == 2 and all(isinstance(side, str) for side in pair)
                for pair in study.compare
            ),
            "compare: needs pairs of arms",
        ),
        (not sizes, "no [size.NAME]; give at least one"),
        (len(arms) < 2, "fewer than two arms; add [arm.NAME] or [factorial]"),
        (
            not all(
                type(seed) is int and seed >= 0
                for group in (study, *sizes.values())
                for seed in group.seeds
            ),
            "seeds must be whole numbers, 0 or more",
        ),
        (
            not all(isinstance(name, str) for name in study.metrics + study.show),
            "metrics and show must be names of figures of result.json",
        ),
        (
            any(len(set(scale.arms)) < len(scale.arms) for scale in sizes.values()),
            "an arm stands twice in a size",
        ),
        (named - arms.keys(), f"no such arm: {', '.join(map(str, named - arms.keys()))}"),
        (
            not all(NAME.fullmatch(arm) for arm in (*arms, *sizes)),
            "names may hold letters, digits and _ . = - only",
        ),
        (
            not NAME.fullmatch(path.stem),
            "its file name, which names the folder of its runs, must be such a name; rename it",
        ),
    ]:
        if problem:
            raise Refusal(f"{path}: {message}")
    return study


@dataclass(frozen=True)
class Trial:
    """One run: an arm with a seed. donor: the trial whose checkpoint it exports or scores again (None: it trains)."""

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
    """A study at one size and one kind of budget: the trials, in the order in which they run."""

    study: Study
    size: Size
    equal: str
    folder: Path
    arms: tuple[str, ...]
    trials: list[Trial]

    def command(self) -> str:
        """What a user types to make these runs (in the default folder)."""
        seeds = tuple(dict.fromkeys(t.seed for t in self.trials))
        chosen = (
            ""
            if seeds == (self.size.seeds or self.study.seeds)
            else f" --seeds {','.join(map(str, seeds))}"
        )
        return f"python ablate.py run {from_root(self.study.path)} --size {self.size.name} --equal {self.equal}{chosen}"

    def groups(self) -> list[list[Trial]]:
        """Each training with the trials that share it."""
        return [
            [t, *(f for f in self.trials if f.donor == t.id)]
            for t in self.trials
            if t.donor is None
        ]


def from_root(path: Path) -> str:
    """The path as a run sees it: relative to the repository where it lies in it."""
    path = path.absolute()
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def matrix(
    study: Study, size: str, equal: str, seeds: tuple[int, ...] = (), out: Path | None = None
) -> Matrix:
    """All trials, seed by seed (A B A B, so that drift of the machine hits all arms alike). Arms whose training settings
    agree (Config.training_scopes) share one training. Every setting is checked here, before anything starts."""
    if size not in study.sizes:
        raise Refusal(f"{study.path}: no size {size}; choose from {', '.join(study.sizes)}")
    scale, trials, donors = study.sizes[size], [], {}
    folder = (out or ROOT / "logs/runs" / study.name / f"{size}-{equal}").absolute()
    budget = {
        "steps": {"ITERATIONS": str(scale.steps), "MAX_WALLCLOCK_SECONDS": "0"},
        "time": {"MAX_WALLCLOCK_SECONDS": str(scale.seconds)},
    }[equal]
    arms, seeds = (
        scale.time_arms * (equal == "time") or scale.arms or tuple(study.arms),
        seeds or scale.seeds or study.seeds,
    )
    if len(arms) * len(seeds) > MAX_TRIALS:
        raise Refusal(
            f"{study.path}: {len(arms)} arms with {len(seeds)} seeds: over {MAX_TRIALS:,} trials; leave some out"
        )
    for seed in seeds:
        for arm in arms:
            env = {**study.env, **scale.env, **study.arms[arm], **budget, "SEED": str(seed)}
            env |= {"RUN_ID": f"{arm}-s{seed}", "LOGS_DIR": from_root(folder)}
            try:
                cfg = Config.from_env(env)
            except Refusal as refusal:
                raise Refusal(f"{study.path}: arm {arm}: {refusal}") from None
            key = (cfg.digest(*cfg.training_scopes), cfg.data_path)
            donor = donors.setdefault(key, Trial(arm, seed, folder / env["RUN_ID"], env, cfg))
            if (
                donor.arm != arm
            ):  # what it inherits from the checkpoint must not replace a default of its own
                differing = {
                    n.upper(): v
                    for n, v in cfg.knobs("grid", "export", "eval").items()
                    if getattr(donor.cfg, n) != v
                }
                env |= {n: str(int(v) if isinstance(v, bool) else v) for n, v in differing.items()}
                env["CHECKPOINT"] = from_root(donor.folder / "checkpoint.bin")
            trials.append(
                Trial(
                    arm,
                    seed,
                    folder / env["RUN_ID"],
                    env,
                    cfg,
                    donor.id if donor.arm != arm else None,
                )
            )
    if not trials or len({t.id for t in trials}) < len(trials):
        raise Refusal(f"{study.path}: no seed, or a seed stands there twice")
    return Matrix(study, scale, equal, folder, arms, trials)


def clean_environment(trial: Trial, size: Size) -> dict[str, str]:
    """The whole environment of a run: its settings, and from ours only what a process needs to start."""
    needed = (
        "PATH",
        "HOME",
        "TMPDIR",
        "LANG",
        "LD_LIBRARY_PATH",
        "CUDA_VISIBLE_DEVICES",
        "CUDA_HOME",
        "SYSTEMROOT",
    )
    machine = {name: os.environ[name] for name in needed if name in os.environ}
    threads = (
        {"OMP_NUM_THREADS": str(size.threads), "GOMP_SPINCOUNT": "1000"} if size.threads else {}
    )
    return machine | threads | trial.env


def command(size: Size) -> list[str]:
    """torchrun where there are several ranks; one process needs no launcher."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size.ranks}"]
    return [sys.executable, *(torchrun if size.ranks > 1 else []), "train_gpt.py"]
