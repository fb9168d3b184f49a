"""What is said of sick runs: which illness, where, and which key to turn; and nothing of a healthy one."""

import numpy as np
import pytest

from deepseek_jax.training.advice import RECENT, History, advice, layer_names
from deepseek_jax.training.metrics import max_vio
from tests.tiny_run import tiny

STEPS = 4 * RECENT
CFG = tiny(train={"steps": STEPS, "batch_size": 4})  # layers: 1 and MTP 1; 8 experts, 2 per token
UNIGRAM = 5.0
EVEN = np.full((2, 8), 32)  # of 128 tokens per layer


def run(counts_le=EVEN, loss=lambda step: 3 + 2 * np.exp(-step / 40), validation=None, **more):
    """Records of a healthy run, but for what is given."""
    counts_le = np.asarray(counts_le)
    records = []
    for step in range(1, STEPS + 1):
        values = {
            "loss": loss(step),
            "expert_counts": counts_le.tolist(),
            "max_vio": max_vio(counts_le),
            "skipped": 0,
        }
        times = {"step_seconds": 1.0, "data_seconds": 0.01}
        records.append({"kind": "train", "step": step, **values, **times, **more})
        if step % RECENT == 0:
            found = loss(step) if validation is None else validation[step // RECENT - 1]
            records.append({"kind": "eval", "step": step, "loss": found})
    return records


def said(records, cfg=CFG, unigram=UNIGRAM):
    return {one.about: one.text for one in advice(cfg, History(records), unigram)}


def test_a_healthy_run():
    assert said(run()) == {}
    assert said([]) == {}
    assert (
        said(run(loss=lambda step: float("nan") if step == 7 else 3.0, validation=[3.0, 3.01, 2.9, 2.91]))
        == {}
    )


def test_a_dense_model_has_no_experts():
    dense = {
        "first_k_dense_replace": 2,
        "num_nextn_predict_layers": 0,
        "n_routed_experts": 0,
        "num_experts_per_tok": 0,
    }
    records = [r | {"expert_counts": [], "max_vio": []} for r in run()]
    assert said(records, tiny(model=CFG.model.__dict__ | dense)) == {}


def test_layers_have_the_models_numbers():
    assert layer_names(CFG) == ["1", "MTP 1"]


def test_experts_without_tokens():
    counts = EVEN.copy()
    counts[0, [2, 5]] = 0
    assert said(run(counts)) == {
        "idle experts": f"2 of 16 experts got no token in steps {STEPS - RECENT + 1} to {STEPS} (layer 1: 2, 5): "
        "raise optimizer.gamma (0.01)"
    }
    few = said(run(counts, balance_loss=0.0)[-10:])
    assert list(few) == ["idle experts"]  # 10 steps of 24 tokens per expert are enough
    assert said(run(counts // 20)[-10:]) == {}  # of 1 token are not: it may be chance


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"balance": {"mode": "none"}}, "set balance.mode=loss_free (none)"),
        ({"balance": {"mode": "classic"}}, "raise balance.classic_alpha (0.01)"),
        ({"model": CFG.model.__dict__ | {"scoring_func": "softmax"}}, "raise balance.seq_alpha (0.0001)"),
    ],
)
def test_the_key_is_that_of_the_way_of_balancing(changes, key):
    counts = EVEN.copy()
    counts[1, 0] = 0
    text = said(run(counts), tiny(**changes))["idle experts"]
    assert text.endswith(f"(layer MTP 1: 0): {key}")


def test_max_vio_at_its_maximum():
    counts = EVEN.copy()
    counts[1] = [128, 60, 20, 20, 10, 10, 4, 4]
    assert max_vio(counts)[1] == 3.0  # 8 / 2 - 1
    text = said(run(counts))["MaxVio"]
    assert text == (
        "MaxVio is at its maximum of 3.00 in layer MTP 1: the same 2 experts get every token: "
        "raise optimizer.gamma (0.01) and lower optimizer.peak_lr (0.003)"
    )
    counts[1] = [100, 100, 20, 20, 16, 0, 0, 0]
    assert "MaxVio" not in said(run(counts))


def test_validation_rises_while_training_falls():
    text = said(run(validation=[4.0, 3.5, 3.6, 3.9]))["validation"]
    assert text == (
        f"validation loss rose from 3.500 at step {2 * RECENT} to 3.900 at step {STEPS}: training loss still falls, so "
        f"the model learns its texts by heart: give more text (data.source), lower train.steps ({STEPS}) to "
        f"{2 * RECENT}, or raise optimizer.weight_decay (0.1)"
    )


def test_both_losses_rise():
    found = said(run(loss=lambda step: 3 + step / STEPS))
    assert set(found) == {"training loss", "validation"}
    assert found["training loss"].startswith(
        f"training loss rose from 3.128 at step {RECENT} to 3.877: lower optimizer.p"
    )
    assert found["validation"].endswith(f"to 4.000 at step {STEPS}: lower optimizer.peak_lr (0.003)")


def test_no_better_than_unigram():
    records = run(loss=lambda step: 5.5)
    assert said(records) == {
        "unigram": "validation loss 5.500 is no better than a unigram model's 5.000, which sees no context: "
        f"raise train.steps ({STEPS}) or optimizer.peak_lr (0.003)"
    }
    assert said([r for r in records if r["step"] < STEPS // 2]) == {}  # too early to say
    assert said(records, unigram=None) == {}


def test_skipped_steps():
    text = said(run(skipped=3))["skipped steps"]
    assert text.startswith(
        "3 step(s) skipped, because loss or gradient were not finite: lower optimizer.peak_lr (0.003)"
    )


def test_waiting_for_data():
    text = said(run(data_seconds=0.4))["data"]
    assert text == (
        "40% of the time goes by waiting for data: put data.cache_dir (.cache) on a faster disk, or lower "
        "data.fim_rate (0.1)"
    )
