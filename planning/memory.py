"""The most bytes that a rank holds on a GPU, where torch.compile fuses what is element-wise.

A formula with three constants, fitted on peaks that logs state (tests/golden/plan.json): two of
ours on an H200, and records from 11 to 17 visits and 1,024 to 8,192 tokens of vocabulary. It is
within 4 % of each, but 17 % below that of #194's own script. Eager runs and CPUs are another
matter.

Why no trace: what torch's partitioner keeps of fake tensors is 1 % below to 11 % above those peaks,
and takes 8 to 17 s of a CPU. test_plan.py asks it about three blocks.
"""

from planning.machines import CPU
from train_gpt import GPT, Config, StepShape

# A visit of a block keeps for the backward pass, of each token: so many vectors of MODEL_DIM, and
# so many of the MLP's hidden width, in bf16
STREAMS = 12.0
HIDDEN = 2.3
# Bytes of each logit
LOGIT = 7.0
BF16 = 2
FP32 = 4


def hidden_width(model: GPT) -> int:
    return len(model.blocks[0].mlp.fc.weight)


def kept_bytes(model: GPT, loops: int) -> float:
    """Of each token of a micro-batch, from the forward pass to the backward one."""
    vocabulary, width = model.tok_emb.shape
    visits = sum(map(len, model.order(loops)))
    of_a_visit = STREAMS * width + HIDDEN * hidden_width(model)
    return visits * of_a_visit * BF16 + vocabulary * LOGIT


def copies(cfg: Config) -> int:
    """Of the parameters, in fp32: weights, gradients and two moments; averages; QAT's or QNA's."""
    views = cfg.qat_enabled or cfg.qna_enabled
    return 4 + len(cfg.collected()) + views


def training_bytes(cfg: Config, model: GPT, shape: StepShape) -> float:
    """At the largest: with all loops."""
    parameters = sum(p.numel() for p in model.parameters())
    tokens = shape.rows * shape.length
    return copies(cfg) * FP32 * parameters + tokens * kept_bytes(model, cfg.num_loops)


def scoring_bytes(cfg: Config, model: GPT, world: int) -> float:
    """Beside what training still holds, which is freed where an artifact is scored by itself.

    One visit at a time, skips, and all logits of the fixed windows; test-time training keeps as
    much for its backward pass as training. No log states this one by itself: it is not checked.
    """
    vocabulary, width = model.tok_emb.shape
    parameters = sum(p.numel() for p in model.parameters())
    visits = sum(map(len, model.order(cfg.num_loops)))
    passing = (STREAMS + visits / 2) * width * BF16 + HIDDEN * hidden_width(model) * BF16
    tokens = cfg.eval_batch_seqs * cfg.window
    found = [tokens * (passing + vocabulary * LOGIT)]
    if cfg.ttt_mode != "none":
        rows = cfg.ttt_batch_seqs if cfg.ttt_mode == "sgd" else cfg.ttt_batch_size
        own = -(-rows // world)
        found.append(own * cfg.window * kept_bytes(model, cfg.num_loops))
    if cfg.ttt_mode == "lora" and cfg.phased_ttt_enabled:
        windows = min(cfg.global_ttt_batch_seqs, cfg.global_ttt_chunk_tokens // cfg.window)
        found.append(windows * cfg.window * kept_bytes(model, cfg.num_loops))
    # SGD's gradients and momenta beside the weights
    held = 1 if cfg.ttt_mode == "none" else 3
    return held * FP32 * parameters + max(found)


def is_known(cfg: Config, name: str) -> bool:
    """Whether the formula is for such a run: compiled, on a card."""
    return name != CPU and cfg.compile != "0"
