"""The model of the records up to 1.0565: tests/golden/forward.json, made by running #1855's script
and those after it as black boxes.

One hook builds our model from a Config and gives it the weights of the file by their roles. In
float64 ours must agree to the last digits that the file holds; in float32 as near as the script's
own float32 does.

Would have caught: a skip row that belongs to a layer instead of a decoder visit, lanes that open
behind the skip of their first block, a loop of one pass too few, a gate that reads the stream
instead of its norm, a SmearGate that blends what it has blended before, #1945's caps without a
gradient.
"""

import json
from pathlib import Path

import pytest
import torch
from roles import WIDTH, check_gradients, golden_model

from train_gpt import GPT, Config

GOLDEN = json.loads((Path(__file__).parent / "golden" / "forward.json").read_text())
RECORDS = {config["name"]: config for config in GOLDEN["configs"]}


# ── The hook ──────────────────────────────────────────────────────────────────────────────────────
def two_caps(settings: dict) -> bool:
    return isinstance(settings["softcap"], list)


def config_of(settings: dict) -> Config:
    """Ours for the settings of the file. A cap of 1e9 is none."""
    mask = settings["doc_mask"]
    documents = dict(doc_mask=True, doc_max_len=mask["max_len"]) if mask else {}
    loops, first, last = settings["loops"] or (0, 3, 5)
    return Config(
        vocab_size=96,
        num_layers=11,
        model_dim=WIDTH,
        num_heads=4,
        num_kv_heads=2,
        mlp_mult=4.0,
        train_seq_len=48,
        train_batch_tokens=48,
        eval_stride=0,
        init="default",
        smear_gate=False,
        negative_slope=settings["slope"],
        rope_dims=settings["rope_dims"],
        ln_scale=settings["ln_scale"],
        xsa_last_n=settings["xsa_last"],
        skip_gates_enabled=settings["skip_gate"],
        sparse_attn_gate_enabled=settings["sparse_gate"] is not None,
        sparse_attn_gate_scale=settings["sparse_gate"] or 1.0,
        smear_gate_enabled=settings["smear"] is not None,
        smear_mask_bos=settings["smear"] == "bos_masked",
        parallel_start_layer=settings["lane_start"] or 0,
        parallel_final_lane=settings["final_lane"],
        num_loops=loops,
        loop_start=first,
        loop_end=last,
        logit_softcap=30.0 if two_caps(settings) else settings["softcap"] or 1e9,
        asym_logit_rescale=two_caps(settings),
        **documents,
    )


def model_of(golden: dict) -> GPT:
    settings = golden["settings"]
    model = golden_model(config_of(settings))
    with torch.no_grad():
        if two_caps(settings):
            for cap, value in zip(model.softcap.parameters(), settings["softcap"], strict=True):
                cap.fill_(value - 30.0)
        for block in model.blocks:
            if not settings["qk_gain"]:
                block.attn.q_gain.fill_(1.0)
                block.attn.q_gain.requires_grad_(False)
    if not settings["loops_on"]:
        model.loops = 0
    return model


def nats_of(model: GPT) -> torch.Tensor:
    tokens = torch.tensor(GOLDEN["tokens"])
    return model(tokens[None, :-1], tokens[None, 1:])[0]


# ── Every setting of the file ─────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("name", RECORDS)
def test_losses_gradients_and_logits_are_those_of_the_record(exact, name):
    golden = RECORDS[name]
    model = model_of(golden)
    visits = dict(zip(("encoder", "decoder"), model.order(model.loops), strict=True))
    assert visits == golden["visits"]
    nats = nats_of(model)
    nats.mean().backward()
    assert nats.tolist() == pytest.approx(golden["losses"], abs=1e-9)
    check_gradients(model, golden["gradients"])

    # nats of other targets differ by the logits
    tokens = torch.tensor(GOLDEN["tokens"])
    with torch.no_grad():
        last = torch.full((8, 1), 47)
        nats = model(tokens[:-1].expand(8, -1), torch.arange(8)[:, None], last)[:, 0]
    logits = torch.tensor(golden["logits_last_position_first8"])
    assert (nats[0] - nats).tolist() == pytest.approx((logits - logits[0]).tolist(), abs=1e-9)


@pytest.mark.parametrize("name", RECORDS)
def test_in_float32_they_are_as_near_as_the_record_itself(name):
    golden = RECORDS[name]
    model = model_of(golden)
    nats = nats_of(model)
    nats.mean().backward()
    assert nats.tolist() == pytest.approx(golden["losses"], abs=3e-5)
    check_gradients(model, golden["gradients"], 3e-4)
