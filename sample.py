"""Text from a shipped artifact, through the forward pass that scored it.

    python sample.py logs/RUN_ID "Once upon a time" --temperature 0.8 --top-p 0.95 --seed 1

The text goes to stdout as it comes; one line with tokens and CPU seconds to stderr. On the CPU, in
fp32: the same seed gives the same text.
"""

import hashlib
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

if __name__ == "__main__" and "OMP_WAIT_POLICY" not in os.environ:
    # As in train_gpt.py. Threads that spin took 9.0 s of CPU in place of 0.4 for 100 tokens of a
    # small model (2 busy cores, once each)
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
import typer
from torch import Tensor

import train_gpt
from ablation.records import load
from prepare_data import Codec, UserError, exit_code_of, load_tokenizer, options_as_parameters
from train_gpt import BOS, GPT, Config, Refusal, refuse

app = typer.Typer(add_completion=False, rich_markup_mode=None)

# Beside a run's artifact, and in a submission folder
ARTIFACT = "artifact.bin"
TOKENIZER = "tokenizer.model"

# What a decoder makes of bytes that are no character, or only the start of one
NO_CHARACTER = "\ufffd"


# ── Options ───────────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """What to sample from, and how."""

    artifact: Annotated[Path, typer.Argument(help="an artifact.bin, or the folder of a run")]
    prompt: Annotated[str, typer.Argument(help="how the text begins")]
    temperature: Annotated[
        float, typer.Option(help="0: always the likeliest token; 1: as the model has it")
    ] = 0.8
    top_p: Annotated[
        float, typer.Option(help="draw among the likeliest tokens that have this share together")
    ] = 0.95
    seed: Annotated[int, typer.Option(help="of the draws")] = 1
    tokens: Annotated[int, typer.Option(help="at most so many; the text may end before")] = 100
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="default: tokenizer.model beside the artifact, or TOKENIZER_PATH of its run"
        ),
    ] = None

    def check(self) -> None:
        """Refusal on a value that means nothing."""
        told = f"--temperature {self.temperature}"
        refuse(not 0 <= self.temperature < math.inf, f"{told}: give 0 (greedy) or more")
        refuse(not 0 < self.top_p <= 1, f"--top-p {self.top_p}: give more than 0, 1 at most")
        refuse(not 0 <= self.seed < 2**63, f"--seed {self.seed}: give 0 or more, below 2**63")
        refuse(self.tokens < 1, f"--tokens {self.tokens}: give 1 or more")
        refuse(not self.prompt, "the prompt is empty: say how the text begins")


# ── Model and tokenizer ───────────────────────────────────────────────────────────────────────────
def read_model(path: Path) -> tuple[Config, GPT]:
    """The model of an artifact with the settings in it. Refusal where the file is none of ours."""
    launch = Config(eval_only=str(path))
    knobs, state = train_gpt.read_artifact(path)
    cfg = train_gpt.inherit_settings(launch, knobs, state)
    model = GPT(cfg)
    model.load_state_dict(state)
    return cfg, model


def told_tokenizer(folder: Path) -> tuple[Path | None, str]:
    """(tokenizer, its sha256) by the result of the run whose folder this is; else (None, "")."""
    if not (folder / "result.json").exists():
        return None, ""
    run = load(folder)
    return Path(run["config"]["tokenizer_path"]), run["data"]["tokenizer_sha256"]


def find_tokenizer(given: Path | None, folder: Path) -> Path:
    """The file of the tokenizer: the one given, the one beside the artifact, or that of its run.

    Refusal where there is none, or where the run had another one.
    """
    of_the_run, sha256 = told_tokenizer(folder)
    remedy = "give the one that made the shards with --tokenizer"
    places = [given] if given else [folder / TOKENIZER, of_the_run]
    there = [path for path in places if path and path.is_file()]
    looked = " and ".join(str(path) for path in places if path)
    refuse(not there, f"{looked}: no tokenizer there; {remedy}")

    path = there[0]
    own = hashlib.sha256(path.read_bytes()).hexdigest()
    refuse(
        sha256 not in ("", own),
        f"{path}: another tokenizer than the run's (sha256 {own[:12]}..., not {sha256[:12]}...); "
        f"{remedy}",
    )
    return path


def read_codec(path: Path, cfg: Config) -> Codec:
    """The tokenizer, with CaseOps where it has such pieces. Refusal unless it fits the model."""
    try:
        tokenizer = load_tokenizer(path)
    except UserError as error:
        raise Refusal(error.format_message()) from None
    pieces = tokenizer.vocab_size()
    refuse(
        pieces != cfg.vocab_size,
        f"{path}: has {pieces} pieces, the artifact is of VOCAB_SIZE={cfg.vocab_size}; give the "
        "tokenizer that made its shards with --tokenizer",
    )
    return Codec(tokenizer)


def encode_prompt(codec: Codec, prompt: str) -> list[int]:
    """The tokens of the start of a document: BOS, then the prompt.

    Refusal where the tokenizer cannot spell it.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise Refusal(f"the prompt {prompt!r} is no text (UTF-8): write it again") from None
    tokens = codec.encode(prompt)
    unknown = codec.tokenizer.unk_id()
    if unknown in tokens:
        lost = [c for c in dict.fromkeys(prompt) if unknown in codec.encode(c)]
        raise Refusal(f"the tokenizer cannot spell {''.join(lost)!r}: leave it out of the prompt")
    refuse(not tokens, f"the prompt {prompt!r} has no character that the tokenizer keeps: add text")
    return [BOS, *tokens]


# ── Sampling ──────────────────────────────────────────────────────────────────────────────────────
@torch.no_grad()
def log_probabilities(model: GPT, ids: list[int], window: int) -> Tensor:
    """(vocab,) fp64 log-probabilities of the token that comes behind these.

    Each is minus the nats that GPT.forward gives this target at the last place. Of a longer text
    the last `window` tokens are read, as a sliding window of stride 1 does. Refusal (5) on NaN.
    """
    row = torch.tensor([ids[-window:]])
    last = torch.tensor([[row.shape[1] - 1]])
    every_token = torch.arange(len(model.tok_emb))[:, None, None]
    nats = model(row, every_token, last).flatten().double()
    problem = "the artifact gives no probabilities (NaN): export it again"
    refuse(nats.isnan().any(), problem, 5)
    return -nats


def choose(log_p: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """The next token: the likeliest at temperature 0, else drawn from the nucleus.

    That is the fewest tokens, the likeliest first, which have `top_p` of the probability together.
    """
    if temperature == 0:
        return int(log_p.argmax())
    p = ((log_p - log_p.max()) / temperature).softmax(0)
    p, tokens = p.sort(descending=True, stable=True)
    before = p.cumsum(0) - p
    nucleus = p.where(before < top_p, 0.0)
    return int(tokens[torch.multinomial(nucleus, 1, generator=generator)])


def generate(cfg: Config, model: GPT, ids: list[int], options: SampleOptions) -> Iterator[int]:
    """The tokens behind these, until the model begins another document or there are enough."""
    ids = [*ids]
    generator = torch.Generator().manual_seed(options.seed)
    for _ in range(options.tokens):
        log_p = log_probabilities(model, ids, cfg.window)
        token = choose(log_p, options.temperature, options.top_p, generator)
        if token == BOS:
            return
        ids.append(token)
        yield token


# ── Text ──────────────────────────────────────────────────────────────────────────────────────────
def on_screen(text: str) -> str:
    """The text without characters that command a terminal: these as Python writes them."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


class Writer:
    """Writes the text of a growing list of tokens, each character once.

    Care: a character may be several tokens (bytes), and an operator of CaseOps is part of the next
    one. So all is decoded each time, and what may still change waits.
    """

    def __init__(self, codec: Codec):
        self.codec = codec
        self.written = 0

    def write(self, tokens: list[int], complete: bool = False) -> None:
        """Writes what is new; of an incomplete text not the start of a character."""
        text = self.codec.decode(tokens)
        if not complete:
            text = text.rstrip(NO_CHARACTER)
        print(on_screen(text[self.written :]), end="", flush=True)
        self.written = max(self.written, len(text))


def sample(options: SampleOptions) -> None:
    """Prints the prompt, what the model writes behind it, and what that took."""
    options.check()
    path = options.artifact
    if path.is_dir():
        path = path / ARTIFACT
    cfg, model = read_model(path)
    codec = read_codec(find_tokenizer(options.tokenizer, path.parent), cfg)
    ids = encode_prompt(codec, options.prompt)

    began = time.process_time()
    writer = Writer(codec)
    text = ids[1:]
    writer.write(text)
    for token in generate(cfg, model, ids, options):
        text.append(token)
        writer.write(text)
    writer.write(text, complete=True)
    print(flush=True)

    made = len(text) - len(ids) + 1
    seconds = time.process_time() - began
    end = "as many as --tokens" if made == options.tokens else "then the document ends (BOS)"
    print(
        f"{made} tokens, {end}; {seconds:.2f} s of CPU ({began:.1f} s before, to start)",
        file=sys.stderr,
    )


@app.command(help=__doc__.split("\n\n")[0])
@options_as_parameters(SampleOptions)
def command(options: SampleOptions) -> None:
    sample(options)


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return the exit code."""
    if sys.stdout:
        # whatever the terminal can show
        sys.stdout.reconfigure(errors="backslashreplace")
    return exit_code_of(app, "sample.py", arguments, Refusal)


if __name__ == "__main__":
    sys.exit(main())
