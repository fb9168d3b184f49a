"""What takes too long for each run of the tests:

    python -m tests.posttraining.grpo_long

In the exact mode, values in training are the sampler's bits; the 671B model's step lowers over 512 devices, none of which is there;
an engine over the devices of a mesh samples as one on one device does.
"""

import io
import os
import tempfile
from pathlib import Path

os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax
import numpy as np

from configs import v3_grpo
from deepseek_jax.config import from_config_dict
from deepseek_jax.parallel.mesh import abstract_mesh, make_mesh
from deepseek_jax.posttraining.experience import abstract_rows
from deepseek_jax.posttraining.grpo import GRPO, make_step
from deepseek_jax.posttraining.grpo_settings import GRPOConfig
from deepseek_jax.training.metrics import METRICS_FILE, read_records
from deepseek_jax.training.step import abstract_state
from tests.golden.run import StopAfter
from tests.posttraining.grpo_cases import config, trainer
from tests.tiny_run import HYPER


def exact(folder: Path) -> str:
    """Before the first update of a rollout in every bit; with the weights of the second, as these would draw now."""
    changes = {"exact": True, "keep_routes": False, "reference_every": 0}
    run = trainer(config(folder, rollouts=changes, loss={"beta": 0.0}))
    run.run(StopAfter(2), io.StringIO())
    again_in_every_bit(run)
    run.close()
    first, second = [r for r in read_records(run.out_dir / METRICS_FILE) if r["kind"] == "train"]
    assert first["sampler_gap_max"] == 0 and first["ratio"] == 1 and first["clip_share"] == 0, first
    assert second["ratio_distance"] > 1e-3, second
    assert abs(second["sampler_gap"] / second["ratio_distance"] - 1) < 0.2, second
    return f"|ratio - 1| of the second update {second['ratio_distance']:.4f}"


def again_in_every_bit(run: GRPO) -> None:
    """What the loop takes for the first update of a rollout, the bits that were drawn, is what the engine's programs say of it."""
    run._load()
    groups = run._groups(run.step)
    sampling = run.cfg.rollouts.sampling(run.data.tokenizer.stop_ids)
    pairs = [(group.prompt.ids.tolist(), sample) for group in groups for sample in group.samples]
    for (_, sample), found in zip(pairs, run.rollouts.again(pairs, sampling), strict=True):
        np.testing.assert_array_equal(found.view(np.uint32), sample.logprobs.view(np.uint32))


def lowered(folder: Path) -> str:
    cfg = from_config_dict(v3_grpo.get_config(), GRPOConfig)
    mesh = abstract_mesh(cfg.mesh, 512)
    traced = make_step(cfg, mesh).trace(abstract_state(cfg, mesh), abstract_rows(cfg, mesh), HYPER)
    assert traced.out_info[1].objective["clip_share"].shape == ()
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    return f"{len(text) / 2**20:.0f} MiB of StableHLO"


def over_a_mesh(folder: Path) -> str:
    """Experts over two devices, rows on both: the same answers as of one device."""
    one = trainer(config(folder / "one"))
    cfg = config(folder / "two", mesh={"local": 2})
    two = GRPO(cfg, make_mesh(cfg.mesh, jax.devices()[:2]))
    groups = []
    for run in (one, two):
        run._load()
        groups.append(run._groups(0))
        run.close()
    for a, b in zip(*groups, strict=True):
        for x, y in zip(a.samples, b.samples, strict=True):
            np.testing.assert_array_equal(x.tokens, y.tokens)
            np.testing.assert_allclose(x.logprobs, y.logprobs, atol=1e-4)
    return f"{sum(len(group.samples) for group in groups[0])} answers"


def main() -> None:
    jax.config.update("jax_num_cpu_devices", 2)
    for check in (exact, over_a_mesh, lowered):
        with tempfile.TemporaryDirectory() as folder:
            print(f"{check.__name__}: {check(Path(folder))}", flush=True)


if __name__ == "__main__":
    main()
