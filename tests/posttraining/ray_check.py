"""Two processes under Ray sample what one engine samples, take weights by version, and do not hang when one dies:

python -m tests.posttraining.ray_check
"""

import os
import signal
import tempfile
from pathlib import Path

os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax
import numpy as np

from deepseek_jax.config import MeshConfig
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.posttraining.engine_rollouts import EngineRollouts, Parameters
from deepseek_jax.posttraining.ray_rollouts import RayRollouts
from deepseek_jax.posttraining.rollouts import Sampling
from deepseek_jax.serving.options import Options
from tests.oracle.tiny import weights
from tests.posttraining.grpo_cases import CFG

OPTIONS = Options(rows=4, max_model_len=64, waiting=1 << 20, steady=True)
PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
SAMPLING = Sampling(max_tokens=12)


def same(a, b) -> bool:
    return all(
        x.prompt == y.prompt
        and x.version == y.version
        and np.array_equal(x.tokens, y.tokens)
        and np.allclose(x.logprobs, y.logprobs, atol=1e-5)
        for x, y in zip(a, b, strict=True)
    )


def main() -> None:
    over = MeshConfig()
    ids = CFG.model.vocab_size
    one = EngineRollouts(CFG.model, make_mesh(over, jax.devices()[:1]), over, OPTIONS, ids)
    two = RayRollouts(CFG.model, OPTIONS, ids, replicas=2)
    parameters = [Parameters(*jax.tree.map(jax.numpy.asarray, weights(CFG.model, seed))) for seed in (1, 2)]
    processes = [two._ray.get(replica.process.remote()) for replica in two.replicas]
    assert len({*processes, os.getpid()}) == 3
    drawn = []
    for version, params in enumerate(parameters, 3):
        for rollouts in (one, two):
            rollouts.load(params, version)
        drawn.append(one.sample(PROMPTS, 3, SAMPLING, 7))
        assert same(drawn[-1], two.sample(PROMPTS, 3, SAMPLING, 7))
    assert not same(*([s._replace(version=0) for s in one] for one in drawn))
    print(f"{len(drawn[0])} samples of processes {processes} are those of one engine, with both weights")
    # What was begun before weights came is answered by the ones before.
    later = two.begin(PROMPTS, 3, SAMPLING, 7)
    two.load(parameters[0], 5)
    assert same(later(), drawn[1]) and {s.version for s in two.sample(PROMPTS, 1, SAMPLING, 7)} == {5}
    print("what was begun before new weights came is of the old ones")
    os.kill(processes[1], signal.SIGKILL)
    try:
        two.sample(PROMPTS, 1, SAMPLING, 7)
        raise AssertionError("a dead replica answered")
    except OSError as error:
        print(f"a replica was killed: {error}")
    two.close()
    # A whole run with rollouts begun one ahead.
    from tests.posttraining.grpo_cases import config, trainer

    with tempfile.TemporaryDirectory() as folder:
        import io

        from deepseek_jax.training.metrics import METRICS_FILE, read_records

        run = trainer(config(Path(folder), rollouts={"replicas": 2, "ahead": 1}))
        run.run(progress_file=io.StringIO())
        run.close()
        found = [r for r in read_records(run.out_dir / METRICS_FILE) if r["kind"] == "train"]
        print("staleness of each step's rollout, in steps:", [r["staleness"] for r in found])
        assert [r["staleness"] for r in found] == [0, 0, 2, 2]


if __name__ == "__main__":
    main()
