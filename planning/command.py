"""python train_gpt.py --plan: its options, what it prints, its exit code."""

import argparse
import json
import os
import sys

from planning.forecast import Options, machine_rows, plan
from planning.machines import CPU, CPU_MFU, MACHINES, MFU
from planning.screen import screen
from train_gpt import Config, Refusal, likeness_line, nearest_base, refuse, say, setting

MOST_GPUS = 8


class Parser(argparse.ArgumentParser):
    """Refuses in one line."""

    def error(self, message: str) -> None:
        raise Refusal(f"--plan: {message}; python train_gpt.py --plan --help lists its options")


def parser() -> Parser:
    found = Parser(
        "train_gpt.py --plan", description="What a run would take. Nothing is trained or scored."
    )
    found.add_argument("settings", nargs="*", metavar="NAME=value", help="as for a run")
    found.add_argument("--device", choices=MACHINES, default="h100", help="default: h100")
    found.add_argument(
        "--gpus", type=int, metavar="N", help="1 to 8; default: 8; ranks of a CPU: 1"
    )
    found.add_argument(
        "--mfu",
        type=float,
        metavar="SHARE",
        help=f"of the data sheet's rate; default: {MFU}, and {CPU_MFU} of a CPU's own",
    )
    found.add_argument("--price", type=float, default=0.0, metavar="$", help="of a GPU for an hour")
    found.add_argument("--json", action="store_true", help="everything, for programs")
    return found


def show(arguments: list[str]) -> int:
    """Prints the plan of the environment and the arguments, on one rank. Returns the exit code."""
    told = parser().parse_intermixed_args([word for word in arguments if word != "--plan"])
    cfg, refused = launch(told.settings)
    refuse(told.mfu is not None and not 0 < told.mfu <= 1, f"--mfu {told.mfu}: above 0, at most 1")
    usual = 1 if told.device == CPU else MOST_GPUS
    gpus = usual if told.gpus is None else told.gpus
    options = Options(told.device, gpus, told.mfu or 0.0, told.price)
    check(cfg, options)
    near = None if cfg.base else nearest_base(vars(cfg), cfg.given)
    found = {"differences": differences(cfg), "nearest_base": near and near.name}
    found["likeness"] = likeness_line(near, cfg)
    found |= plan(cfg, options)
    found["warnings"] = [*refused, *found["warnings"]]
    found["machines"] = machine_rows(cfg, options)
    if os.environ.get("RANK", "0") == "0":
        say(json.dumps(found, indent=1) if told.json else screen(found), sys.stdout)
    return 2 if refused else 0


def launch(settings: list[str]) -> tuple[Config, list[str]]:
    """The launch; and why it is refused, if it is like a base that it does not name.

    So is the pasted command of a record. It is planned with that base.
    """
    try:
        return Config.from_env(os.environ, settings), []
    except Refusal as refusal:
        if not refusal.base:
            raise
        cfg = Config.from_env(os.environ, [*settings, f"BASE={refusal.base}"])
        # the last line names that base
        reasons = refusal.problems[:-1]
        return cfg, [f"without BASE={refusal.base} it is refused: {reason}" for reason in reasons]


def differences(cfg: Config) -> str:
    """What this launch sets otherwise than its BASE, or else the defaults; in today's names."""
    base = Config.from_env({"BASE": cfg.base} if cfg.base else {})
    own, theirs = cfg.knobs(), base.knobs()
    given = sorted(name.lower() for name in cfg.given)
    return " ".join(setting(name, own[name]) for name in given if own[name] != theirs[name])


def check(cfg: Config, options: Options) -> None:
    """Refusal of what cannot be planned."""
    refuse(not 1 <= options.gpus <= MOST_GPUS, f"--gpus {options.gpus}: choose 1 to {MOST_GPUS}")
    refuse(not 0 <= options.price < 1e6, f"--price {options.price:g}: dollars, 0 or more")
    there = " and ".join(cfg.sources)
    refuse(cfg.sources, f"{there}: --plan is for a run that trains from its first step; unset it")
