"""A configuration in small: the same toggles, shapes by one rule.

In: the Config of an arm at its published size, and the steps that its record took. Out: the
settings that make it small enough for two CPU cores. No number is chosen for an arm: each is the
published one, divided by the divisor of its kind and rounded up.

Kinds and divisors. Widths (of the model, its tables and its adapters) by 8, of which heads are
halved in number and a quarter as wide. Tokens of a row, a window, a stride, by 8, so that a stride
is the same share of a window. Tokens of a step by 768, to whole rows. Steps by 32; an EMA forgets
32 times as fast. Vocabularies by 2, as a tokenizer has more than 256 pieces, each from a folder of
its own. Buckets by 16. Documents of a prefix by 625, for a validation set of a dozen; the chunks
that all weights learn from by 64, as a phase has one document or two.

What does not scale: blocks, of which loops, lanes and value embeddings name the numbers; the 12
dimensions that a gate reads; chunks of a document, as documents keep their length (but a chunk is
at most a window); learning rates, bits, clips, shares of the run.
"""

from train_gpt import Config, Refusal, row_stages

# Kind -> its divisor, and the knobs that are of it
KINDS = {
    "width": (8, "model_dim bigram_dim ve_dim ttt_lora_rank ttt_lora_alpha lqer_rank"),
    "part of a width": (8, "lqer_asym_group"),
    "heads": (2, "num_heads num_kv_heads"),
    "width of a head": (4, "rope_dims"),
    "weights of a matrix": (64, "keep_float_max_numel"),
    "vocabulary": (2, "vocab_size"),
    "buckets": (16, "bigram_vocab_size"),
    "tokens of a row": (8, "train_seq_len eval_seq_len rope_ntk_len doc_max_len eval_stride"),
    "tokens of a chunk": (8, "ttt_chunk_tokens"),
    "tokens of a phase": (64, "global_ttt_chunk_tokens"),
    "tokens of a step": (768, "train_batch_tokens"),
    "sequences": (8, "eval_batch_seqs ttt_batch_seqs global_ttt_batch_seqs ttt_batch_size"),
    "calibration": (8, "gptq_calibration_batches"),
    "documents": (625, "phased_ttt_prefix_docs"),
    "steps": (
        32,
        "iterations warmup_steps warmdown_iters muon_momentum_warmup_steps swa_every "
        "seq_change_warmup_steps",
    ),
}
DIVISORS = {name: divisor for divisor, names in KINDS.values() for name in names.split()}

# Counts that stay: why
UNSCALED = {
    "num_layers": "loops, lanes and value embeddings name blocks",
    "xsa_last_n": "blocks",
    "loop_start": "a block",
    "loop_end": "a block",
    "parallel_start_layer": "a block",
    "parallel_residual_start": "a block",
    "num_loops": "passes",
    "gate_window": "12 of 64 dimensions are there too",
    "ttt_chunk_size": "of a document, which keeps its length; at most a window",
    "ttt_short_score_first_steps": "of documents, which keep their length",
    "token_order": "of text",
    "lqer_top_k": "of matrices, which are as many",
    "muon_backend_steps": "iterations",
    "ttt_epochs": "passes",
    "global_ttt_epochs": "passes",
    "phased_ttt_num_phases": "phases",
    "ttt_freeze_blocks": "blocks",
    "grad_accum_steps": "0: by the machine",
    "train_log_every": "by the size",
    "val_loss_every": "by the size",
    "val_max_tokens": "by the size",
    "cap_bytes": "of the challenge",
}

# The sizes of a study that scale by this rule say so
RULE = "two cores"


def smaller(value: int | float, divisor: int) -> int | float:
    """A positive value by the divisor, rounded up; 0 and below are switches and stay."""
    if value <= 0:
        return value
    return -(-value // divisor) if isinstance(value, int) else value / divisor


def scaled(cfg: Config, steps: int) -> dict[str, str]:
    """VARIABLE -> text of all that this configuration has otherwise in small.

    steps: what it took at the published size.
    """
    values = {name: smaller(getattr(cfg, name), divisor) for name, divisor in DIVISORS.items()}
    values["iterations"] = smaller(steps, DIVISORS["iterations"])
    values["ema_decay"] = 1 - min(1, (1 - cfg.ema_decay) * DIVISORS["iterations"])
    values |= scaled_starts(cfg) | scaled_rows(cfg, values)
    changed = {name: value for name, value in values.items() if value != getattr(cfg, name)}
    return {
        name.upper(): f"{value:.10g}" if isinstance(value, float) else str(value)
        for name, value in changed.items()
    }


def scaled_starts(cfg: Config) -> dict[str, int | float]:
    """The starts of loops, where they are counted in steps."""
    if cfg.looping_kind != "steps":
        return {}
    names = ("enable_looping_at", "loop_phase2_at")
    # a float knob that takes whole steps alone
    return {name: float(-(-getattr(cfg, name) // DIVISORS["iterations"])) for name in names}


def scaled_rows(cfg: Config, values: dict) -> dict[str, int | str]:
    """A step of whole rows, the rows of a schedule, and chunks that fit a window."""
    row = values["train_seq_len"]
    found = {
        "train_batch_tokens": -(-values["train_batch_tokens"] // row) * row,
        "ttt_chunk_size": min(cfg.ttt_chunk_size, values["eval_seq_len"] or row),
    }
    if cfg.train_seq_schedule:
        divisor = DIVISORS["train_seq_len"]
        stages = row_stages(cfg.train_seq_schedule)
        rows = [f"{smaller(length, divisor)}@{end:g}" for length, end in stages]
        found["train_seq_schedule"] = ",".join(rows)
    return found


def data(env: dict[str, str], cfg: Config, small: dict[str, str]) -> dict[str, str]:
    """Shards and tokenizer of a small arm, in a folder of DATA_PATH: sp512, sp4096_caseops."""
    if "DATA_PATH" not in env:
        return {}
    vocabulary = small.get("VOCAB_SIZE", cfg.vocab_size)
    folder = f"{env['DATA_PATH']}/sp{vocabulary}{'_caseops' if cfg.caseops_enabled else ''}"
    return {"DATA_PATH": folder, "TOKENIZER_PATH": f"{folder}/tokenizer.model"}


def check_rule(rule: str, where: str) -> None:
    """Refusal of another rule than ours."""
    if rule not in ("", RULE):
        raise Refusal(f'{where}: scale = {rule}: no such rule; write scale = "{RULE}", or none')
