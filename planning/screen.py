"""A plan as one screen."""

import textwrap

from planning.machines import CPU
from train_gpt import text_table

# ms; what is longer is told in seconds
TEN_SECONDS = 10_000
# Characters of a line that is no row of a table
WIDTH = 100


def screen(p: dict) -> str:
    """What forecast.plan returns, for people."""
    parts = [
        head(p),
        text_table(once_rows(p)),
        text_table(time_rows(p)),
        text_table(machine_table(p)),
        "\n".join(wrapped(f"WARNING: {line}") for line in p["warnings"]),
        "\n".join(notes(p)),
    ]
    return "\n\n".join(part for part in parts if part)


def wrapped(line: str) -> str:
    """As lines of at most WIDTH, but for words that are longer."""
    options = {"break_long_words": False, "break_on_hyphens": False}
    return "\n".join(textwrap.wrap(line, WIDTH, subsequent_indent="  ", **options))


def notes(p: dict) -> list[str]:
    lines = ["Not counted: compiling, reading data, packing the file, the proof of toggles."]
    if not all(row["fits"] for row in p["machines"]):
        lines.insert(0, "*: training takes more memory than the card has")
    return lines


def head(p: dict) -> str:
    """The machine, the model, and when what begins."""
    m, t, flops = p["machine"], p["training"], p["flops"]
    kinds = ", ".join(f"{kind} {n:,}" for kind, n in p["parameters"].items() if kind != "all")
    return "\n".join(
        wrapped(line)
        for line in [
            f"plan: {machine_name(m['name'], m['count'])} at {m['mfu']:.0%} of "
            f"{m['rate'] / 1e12:,.3g} TFLOP/s each",
            f"settings: {p['base'] or 'the defaults'}, with {p['differences'] or 'no difference'}",
            *p["likeness"],
            f"parameters: {p['parameters']['all']:,}: {kinds}",
            f"FLOPs: {flops['trained'] / 1e6:.1f} M a token, trained, = 3 x "
            f"({flops['linear'] / 1e6:.2f} linear + {flops['attention'] / 1e6:.2f} attention); "
            f"{flops['step'] / 1e12:.1f} T a step",
            f"schedule: {t['timeline']}",
            f"text: {t['tokens']:,} tokens, {t['epochs']:.3g} epochs of the "
            f"{t['train_tokens']:,} of {t['text']}",
        ]
    )


def machine_name(name: str, count: int) -> str:
    if name == CPU:
        return f"this CPU, {count} rank{'s' * (count > 1)}"
    return f"{count} x {name.upper()}"


def once_rows(p: dict) -> list[list]:
    """Bytes: of the file, and of memory."""
    size, memory = p["size"], p["memory"]
    most = "at most " if size["at_most"] else ""
    rows = [
        ["bytes", "forecast", "limit", "left"],
        ["artifact", f"{most}{size['artifact']:,}", None, None],
        ["code", f"{size['code']:,}", None, None],
        ["both", f"{most}{size['total']:,}", f"{size['cap']:,}", f"{size['headroom']:,}"],
    ]
    for name in ("training", "scoring"):
        if memory[name]:
            rows.append(
                [
                    f"memory of a GPU, {name}",
                    f"{memory[name] / 1e9:.1f} GB",
                    f"{memory['card'] / 1e9:.0f} GB",
                    f"{(memory['card'] - memory[name]) / 1e9:.1f} GB",
                ]
            )
    return rows


def time_rows(p: dict) -> list[list]:
    """Every phase that takes time on the machine, and what it costs."""
    rows = [["phase", "steps", "ms a step", "seconds", "dollars"]]

    def add(name: str, seconds: float, steps: int | None = None, ms: float | None = None) -> None:
        cost = None
        if p["price"]:
            cost = f"{p['dollars'] * seconds / p['seconds']:.2f}"
        rows.append([name, steps and f"{steps:,}", ms and f"{ms:.1f}", f"{seconds:.1f}", cost])

    for form in p["training"]["forms"]:
        loops = f", {form['loops']} loops" if p["training"]["forms"][-1]["loops"] else ""
        name = f"train, rows of {form['row_tokens']:,}{loops}"
        add(name, form["seconds"], form["steps"], form["step_ms"])
    if p["calibration_seconds"]:
        add("calibrate", p["calibration_seconds"])
    for name, seconds in p["scoring_seconds"].items():
        add(f"score {name}", seconds)
    add("sum", p["seconds"])
    return rows


def machine_table(p: dict) -> list[list]:
    """Steps, and ms of one, for each machine and number of them."""
    counts = sorted({row["count"] for row in p["machines"]})
    cells = {}
    for row in p["machines"]:
        ms = row["step_ms"]
        each = f"{ms:,.0f} ms" if ms < TEN_SECONDS else f"{ms / 1e3:,.0f} s"
        text = f"{row['steps']:,} of {each}"
        if not row["fits"]:
            text += " *"
        cells[row["name"], row["count"]] = text
    rows = [["steps on", *(f"{count} GPU{'s' * (count > 1)}" for count in counts)]]
    for name in dict.fromkeys(row["name"] for row in p["machines"]):
        title = "this CPU" if name == CPU else name.upper()
        rows.append([title, *(cells.get((name, count)) for count in counts)])
    return rows
