"""Settings and a machine in, everything that can be known before a run out.

Nothing is decided here that a run decides: the schedule is the run's own, run at a predicted speed;
so are the windows of scoring, the size of the file, and the warnings about them.
"""

from typing import NamedTuple

import train_gpt
from planning.flops import Flops, flops_of, shapes_of
from planning.machines import (
    CPU,
    MACHINES,
    TTT_SHARE,
    WINDOWS_SHARE,
    Machine,
    machine,
    usual_mfu,
)
from planning.memory import is_known, scoring_bytes, training_bytes
from planning.text import Text, text_of
from train_gpt import (
    GPT,
    LIMIT_SECONDS,
    SCORING_WAYS,
    Config,
    Forecast,
    Form,
    Linear,
    Refusal,
    StepPlan,
)

# So many GPUs have a column in the table of machines
COUNTS = (1, 2, 4, 8)


class Options(NamedTuple):
    """What --plan is told beside the settings."""

    device: str = "h100"
    # ranks, on a CPU
    gpus: int = 8
    # 0: that of the machine
    mfu: float = 0.0
    # dollars for an hour of one GPU; 0: not given
    price: float = 0.0


class Rehearsal:
    """Stands in for a Run: its ranks, and what it would say."""

    rank = 0

    def __init__(self, cfg: Config, device: str, world: int):
        self.world = world
        self.cuda = device != CPU
        self.compile = cfg.compile == "1" or (cfg.compile == "auto" and self.cuda)
        self.said: list[str] = []
        self.warnings: list[str] = []

    def log(self, text: str) -> None:
        self.said.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


class Pace:
    """StepPlan -> seconds of that step, at this rate in FLOP/s; counts the steps of each form."""

    def __init__(self, cfg: Config, model: GPT, rate: float):
        self.cfg = cfg
        self.model = model
        self.rate = rate
        self.seconds: dict[Form, float] = {}
        self.steps: dict[Form, int] = {}

    def __call__(self, now: StepPlan) -> float:
        form = Form(now.loops, now.length)
        if form not in self.seconds:
            flops = flops_of(self.model, *form)
            self.seconds[form] = flops.trained * self.cfg.train_batch_tokens / self.rate
            self.steps[form] = 0
        self.steps[form] += 1
        return self.seconds[form]

    def rows(self) -> list[dict]:
        """Each form of a step: how often it comes and what it takes."""
        return [
            {
                "loops": form.loops,
                "row_tokens": form.length,
                "step_ms": 1e3 * each,
                "steps": self.steps[form],
                "seconds": each * self.steps[form],
            }
            for form, each in self.seconds.items()
        ]


def plan(cfg: Config, options: Options) -> dict:
    """All of it, as JSON can hold it. Refusal of what a run would refuse at once."""
    model = shapes_of(cfg)
    text = text_of(cfg)
    card = machine(options.device)
    run = Rehearsal(cfg, options.device, options.gpus)
    rate = rate_of(card, options)
    shape = train_gpt.step_shape(cfg, run, cfg.train_seq_len)

    calibration = calibration_seconds(cfg, model, rate)
    reserve = reserve_seconds(cfg, calibration)
    pace, seen = trained(cfg, model, rate, reserve)
    scoring = scoring_seconds(cfg, run, model, text, rate)
    training = training_facts(cfg, seen, text)
    training["forms"] = pace.rows()
    training["micro_batch"] = shape._asdict()
    memory = memory_facts(cfg, model, card, shape, options.gpus)
    size = size_facts(cfg, run, model)
    run.warnings += train_gpt.averaging_warnings(cfg, seen)
    run.warnings += own_warnings(seen, training, memory)
    run.warnings += calibration_warnings(cfg, reserve, training["seconds"], calibration)

    seconds = training["seconds"] + calibration + sum(scoring.values())
    hours = cards_of(card, options) * seconds / 3600
    return {
        "base": cfg.base,
        "settings": train_gpt.settings_line(cfg),
        "machine": card._asdict() | {"count": options.gpus, "mfu": mfu_of(card, options)},
        "parameters": parameters(model),
        "flops": flops_facts(cfg, model),
        "training": training,
        "calibration_seconds": calibration,
        "scoring_seconds": scoring,
        "seconds": seconds,
        "dollars": options.price * hours if options.price else None,
        "price": options.price or None,
        "memory": memory,
        "size": size,
        "warnings": run.warnings,
    }


def mfu_of(card: Machine, options: Options) -> float:
    return options.mfu or usual_mfu(card.name)


def cards_of(card: Machine, options: Options) -> int:
    """What works, and is paid: the GPUs, or the one CPU that all ranks share."""
    return 1 if card.name == CPU else options.gpus


def rate_of(card: Machine, options: Options) -> float:
    """FLOP/s of all of them."""
    return card.rate * mfu_of(card, options) * cards_of(card, options)


def trained(cfg: Config, model: GPT, rate: float, reserve: float) -> tuple[Pace, Forecast]:
    """The run's own schedule at this speed, with so many seconds of the budget kept back."""
    paced = train_gpt.left_for_steps(cfg, reserve)
    pace = Pace(paced, model, rate)
    return pace, train_gpt.forecast(paced, pace)


def parameters(model: GPT) -> dict[str, int]:
    """Kind of tensor -> parameters, and all."""
    found = {}
    for p in model.parameters():
        kind = train_gpt.kind_of(p.role)
        found[kind] = found.get(kind, 0) + p.numel()
    return found | {"all": sum(found.values())}


def flops_facts(cfg: Config, model: GPT) -> dict[str, float]:
    """Per token, forward; and per token and step of training: all with all loops."""
    flops: Flops = flops_of(model, cfg.num_loops, cfg.train_seq_len)
    return flops._asdict() | {
        "trained": flops.trained,
        "step": flops.trained * cfg.train_batch_tokens,
    }


def training_facts(cfg: Config, seen: Forecast, text: Text) -> dict:
    tokens = seen.steps * cfg.train_batch_tokens
    return {
        "steps": seen.steps,
        "step_ms": 1e3 * seen.step_seconds,
        "seconds": seen.steps * seen.step_seconds,
        "tokens": tokens,
        "epochs": tokens / text.train_tokens,
        "train_tokens": text.train_tokens,
        "text": text.source,
        "starts": seen.starts,
        "timeline": train_gpt.timeline(seen),
    }


def calibration_seconds(cfg: Config, model: GPT, rate: float) -> float:
    """Of GPTQ: a forward pass, and the products of the inputs of each matrix.

    Those are in fp32, which may be slower than this rate.
    """
    if not cfg.gptq_enabled:
        return 0.0
    encoder, decoder = model.order(cfg.num_loops)
    parts = [model.blocks[layer] for layer in (*encoder, *decoder)]
    layers = [m for part in parts for m in part.modules() if isinstance(m, Linear)]
    products = sum(2.0 * layer.weight.shape[1] ** 2 for layer in layers)
    forward = flops_of(model, cfg.num_loops, cfg.train_seq_len).forward
    tokens = cfg.gptq_calibration_batches * cfg.train_batch_tokens
    return tokens * (forward + products) / rate


def reserve_seconds(cfg: Config, calibration: float) -> float:
    """What GPTQ keeps back of the budget: as told; else its seconds, at most half of it.

    A run refuses to start with more than that.
    """
    if cfg.gptq_enabled and cfg.gptq_reserve_seconds >= 0:
        return cfg.gptq_reserve_seconds
    return min(calibration, 0.5 * cfg.max_wallclock_seconds)


def calibration_warnings(
    cfg: Config, reserve: float, training: float, calibration: float
) -> list[str]:
    """What a run says of so many seconds of training and of GPTQ, before them or after."""
    if not cfg.max_wallclock_seconds:
        return []
    if cfg.gptq_reserve_seconds < 0:
        lines = [train_gpt.long_calibration(cfg, calibration)]
    else:
        lines = [train_gpt.late_calibration(cfg, reserve, training, calibration)]
    return [line for line in lines if line]


def scoring_seconds(
    cfg: Config, run: Rehearsal, model: GPT, text: Text, rate: float
) -> dict[str, float]:
    """Name of a score -> seconds, by the costs that a run projects from its fixed windows.

    text stands in for its Validation.
    """
    each = cfg.window * flops_of(model, cfg.num_loops, cfg.window).forward / rate
    fixed = each * text.n / cfg.window / WINDOWS_SHARE
    names = ["live", "quantised"]
    if cfg.shipped_average != "none":
        names.insert(1, "averaged")
    found = dict.fromkeys(names, fixed)
    for name, way in SCORING_WAYS.items():
        if way.wanted(cfg):
            count, cheaper = way.cost(cfg, run, text)
            share = TTT_SHARE[cfg.ttt_mode] if name == "ttt" else WINDOWS_SHARE
            found[name] = each * float(count) / share
            train_gpt.tell_seconds(run, name, found[name], cheaper)
    return found


def memory_facts(
    cfg: Config, model: GPT, card: Machine, shape: train_gpt.StepShape, world: int
) -> dict[str, float | None]:
    """Bytes of each rank; None where the formula does not hold."""
    known = is_known(cfg, card.name)
    return {
        "training": training_bytes(cfg, model, shape) if known else None,
        "scoring": scoring_bytes(cfg, model, world) if known else None,
        "card": card.memory or None,
    }


def size_facts(cfg: Config, run: Rehearsal, model: GPT) -> dict:
    """Bytes of the file and of the script, beside the cap."""
    weights = {name: p.shape for name, p in model.named_parameters()}
    size = train_gpt.forecast_size(cfg, train_gpt.export_plan(cfg, model), weights)
    train_gpt.log_forecast(cfg, run, size)
    artifact = size.artifact(cfg.compressor)
    code = len(train_gpt.shipped_code(cfg))
    return {
        "artifact": artifact,
        "code": code,
        "total": artifact + code,
        "cap": cfg.cap_bytes,
        "headroom": cfg.cap_bytes - artifact - code,
        "at_most": size.at_most,
    }


def own_warnings(seen: Forecast, training: dict, memory: dict) -> list[str]:
    """What a run finds out at its end, or never."""
    lines = []
    for name, start in seen.starts.items():
        if start is None:
            lines.append(
                f"{name}: never, in the {seen.steps:,} steps of this run; start it earlier"
            )
    if training["seconds"] > LIMIT_SECONDS:
        over = f"{training['seconds']:,.0f} s, over the contest's limit of {LIMIT_SECONDS} s"
        lines.append(f"training: {over}; lower MAX_WALLCLOCK_SECONDS or ITERATIONS")
    if training["epochs"] > 1:
        there = f"{training['train_tokens']:,} tokens ({training['text']})"
        lines.append(f"training reads {training['epochs']:.3g} epochs of {there}: get more shards")
    remedies = {"training": "raise GRAD_ACCUM_STEPS", "scoring": "lower EVAL_BATCH_SEQS"}
    for name, remedy in remedies.items():
        if memory["card"] and memory[name] and memory[name] > memory["card"]:
            there = f"{memory[name] / 1e9:.1f} GB of {memory['card'] / 1e9:.0f} GB"
            lines.append(f"memory of {name}: about {there} on each GPU; {remedy}")
    return lines


class Speeds:
    """Rate in FLOP/s -> what training would come to at it; each rate is walked through once."""

    def __init__(self, cfg: Config):
        self.cfg = cfg
        self.model = shapes_of(cfg)
        self.known: dict[float, Forecast] = {}

    def at(self, rate: float) -> Forecast:
        if rate not in self.known:
            self.known[rate] = self.found(rate)
        return self.known[rate]

    def found(self, rate: float) -> Forecast:
        if self.known and not self.cfg.max_wallclock_seconds:
            # the steps are those of ITERATIONS, at any speed
            other, seen = next(iter(self.known.items()))
            return seen._replace(step_seconds=seen.step_seconds * other / rate)
        reserve = reserve_seconds(self.cfg, calibration_seconds(self.cfg, self.model, rate))
        return trained(self.cfg, self.model, rate, reserve)[1]


def machine_rows(cfg: Config, options: Options) -> list[dict]:
    """Each machine in each number that can share a step: what training would come to."""
    speeds = Speeds(cfg)
    rows = []
    for name in MACHINES:
        card = machine(name)
        for count in COUNTS[:1] if name == CPU else COUNTS:
            run = Rehearsal(cfg, name, count)
            try:
                shape = train_gpt.step_shape(cfg, run, cfg.train_seq_len)
            except Refusal:
                continue
            seen = speeds.at(rate_of(card, options._replace(gpus=count)))
            most = memory_facts(cfg, speeds.model, card, shape, count)["training"]
            rows.append(
                {
                    "name": name,
                    "count": count,
                    "step_ms": 1e3 * seen.step_seconds,
                    "steps": seen.steps,
                    "tokens": seen.steps * cfg.train_batch_tokens,
                    "training_bytes": most,
                    "fits": most is None or most <= card.memory,
                }
            )
    return rows
