"""The text of a run: its own shards, or what is known of those that are published."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from train_gpt import BOS, Config, Split

# Vocabulary -> (training shards, validation targets), as the logs of records count them: #549,
# #1218, #1394; CaseOps: #1855. A training shard has 100,000,000 tokens
PUBLISHED = {
    1024: (80, 62_021_632),
    4096: (143, 45_508_608),
    8192: (128, 40_540_160),
}
PUBLISHED_CASEOPS = (80, 47_851_520)
SHARD_TOKENS = 100_000_000
DOCUMENTS = 50_000

# Share of the documents -> at most so long, over the mean: the first 901 of FineWeb's validation,
# in sp1024 (mean 1,154)
LENGTHS = {
    0.0: 0.091,
    0.1: 0.192,
    0.25: 0.301,
    0.5: 0.554,
    0.75: 1.112,
    0.9: 1.967,
    0.95: 2.911,
    0.99: 7.753,
    1.0: 23.2,
}


class Text(NamedTuple):
    """What the costs of scoring read of a Validation, and the tokens there are to train on."""

    # validation targets
    n: int
    # (n + 1,), BOS where a document begins and 0 elsewhere; empty where no way of scoring asks
    tokens: Tensor
    train_tokens: int
    # where both numbers come from
    source: str


def text_of(cfg: Config) -> Text:
    """DATA_PATH's where there are shards, else the published ones'."""
    if any(Path(cfg.data_path).glob("fineweb_*.bin")):
        return own_text(cfg)
    return published_text(cfg)


def own_text(cfg: Config) -> Text:
    """Refusal of shards that a run would refuse."""
    train = Split(cfg, "train").tokens
    val = Split(cfg, "val")
    targets = min(cfg.val_max_tokens or val.tokens, val.tokens - 1)
    starts = np.zeros(0, bool)
    if asks_for_documents(cfg):
        starts = val.take(0, targets + 1) == BOS
    return Text(targets, torch.from_numpy(starts).byte() * BOS, train, cfg.data_path)


def asks_for_documents(cfg: Config) -> bool:
    """Whether the costs of scoring depend on where documents begin."""
    return cfg.doc_isolated_eval or cfg.ttt_mode == "lora"


def published_text(cfg: Config) -> Text:
    """Documents of the lengths of FineWeb's, in no order. An unknown vocabulary: as with 8192."""
    shards, targets = PUBLISHED.get(cfg.vocab_size, PUBLISHED[8192])
    name = f"the published shards of sp{cfg.vocab_size}"
    # a record's launch names the data alone
    if cfg.caseops_enabled or "caseops" in f"{cfg.data_path}{cfg.tokenizer_path}":
        shards, targets = PUBLISHED_CASEOPS
        name = "the published shards of CaseOps"
    elif cfg.vocab_size not in PUBLISHED:
        name = f"none at DATA_PATH={cfg.data_path}, counted as sp8192's"
    wanted = min(cfg.val_max_tokens or targets, targets)

    tokens = torch.zeros(0, dtype=torch.uint8)
    if asks_for_documents(cfg):
        lengths = document_lengths(DOCUMENTS, targets)
        starts = np.cumsum([0, *lengths[:-1]])
        tokens = torch.zeros(wanted + 1, dtype=torch.uint8)
        tokens[starts[starts <= wanted]] = BOS
    return Text(wanted, tokens, shards * SHARD_TOKENS, name)


def document_lengths(documents: int, tokens: int) -> np.ndarray:
    """(documents,) of at least 2 tokens, with the quantiles of LENGTHS and about this sum."""
    places = (np.arange(documents) + 0.5) / documents
    shape = np.exp(np.interp(places, [*LENGTHS], np.log([*LENGTHS.values()])))
    lengths = np.maximum(np.round(shape * tokens / shape.sum()), 2).astype(np.int64)
    return np.random.default_rng(0).permutation(lengths)
