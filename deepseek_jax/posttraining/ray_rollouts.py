"""`Rollouts` in processes of their own, under Ray: an actor for each replica of the model, with an engine on its devices.

Weights go out by version, once for all replicas; a replica takes them when it has answered what it was asked before. So a rollout
that is begun before it is needed (`begin`) is sampled while the trainer trains, with weights as old as `rollouts.ahead` allows, and
every answer says which (`Sample.version`). What is sampled is what one engine samples: answers have keys of their own.

Ray is an extra: `pip install "deepseek_jax[ray]"`.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from deepseek_jax.checks import require
from deepseek_jax.config import MeshConfig, ModelConfig
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parallel.processes.together import on_host
from deepseek_jax.posttraining.engine_rollouts import EngineRollouts, Parameters
from deepseek_jax.posttraining.rollouts import Sample, Sampling, seeds_of_prompts
from deepseek_jax.serving.options import Options

ROOT = Path(__file__).parents[2]


class Replica:
    """What an actor runs: `EngineRollouts` on one device, whose weights come as NumPy's arrays."""

    def __init__(self, cfg: ModelConfig, options: Options, num_ids: int):
        over = MeshConfig()
        self._rollouts = EngineRollouts(cfg, make_mesh(over, jax.local_devices()[:1]), over, options, num_ids)

    def load(self, params: Parameters, version: int) -> None:
        self._rollouts.load(jax.tree.map(jax.numpy.asarray, params), version)

    def sample(self, prompts: list[list[int]], n: int, sampling: Sampling, seeds: list[int]) -> list[Sample]:
        return self._rollouts.sample(prompts, n, sampling, seeds)

    def process(self) -> int:
        return os.getpid()


class RayRollouts:
    """Args: cfg, options, num_ids: of each replica, as of `EngineRollouts`. replicas: how many; each takes a CPU, or a GPU where
    this process computes on GPUs. address: of a cluster; None: one on this machine, which ends with `close`.

    Raises ValueError where Ray is not installed, or has no room for the replicas.
    """

    def __init__(
        self, cfg: ModelConfig, options: Options, num_ids: int, replicas: int, address: str | None = None
    ):
        self._ray = _started(replicas, address)
        gpus = int(jax.default_backend() == "gpu")
        room = self._ray.cluster_resources().get("GPU" if gpus else "CPU", 0)
        require(
            room >= replicas,
            f"{replicas} replicas need as many {'GPUs' if gpus else 'CPUs'}, and Ray has {room:g}",
        )
        actor = self._ray.remote(num_cpus=1, num_gpus=gpus)(Replica)
        self.replicas = [actor.remote(cfg, options, num_ids) for _ in range(replicas)]
        self._loads: list[Any] = []

    def load(self, params: Parameters, version: int) -> None:
        """Sends them, and does not wait: a replica answers first what it was asked before. All processes of the mesh call it."""
        held = self._ray.put(jax.tree.map(on_host, params))
        self._get(self._loads)  # whether the ones before arrived
        self._loads = [replica.load.remote(held, version) for replica in self.replicas]

    def begin(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling, seed: int | Sequence[int]
    ) -> Callable[[], list[Sample]]:
        """Begins what `sample` does; the result waits for it."""
        seeds = seeds_of_prompts(seed, len(prompts))
        shares = [part for part in np.array_split(np.arange(len(prompts)), len(self.replicas)) if part.size]
        asked = [
            replica.sample.remote([list(prompts[i]) for i in share], n, sampling, [seeds[i] for i in share])
            for replica, share in zip(self.replicas, shares, strict=False)
        ]

        def result() -> list[Sample]:
            return [
                sample._replace(prompt=int(share[sample.prompt]))
                for share, answers in zip(shares, self._get(asked), strict=True)
                for sample in answers
            ]

        return result

    def sample(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling, seed: int | Sequence[int]
    ) -> list[Sample]:
        """As `Rollouts.sample`."""
        return self.begin(prompts, n, sampling, seed)()

    def close(self) -> None:
        for replica in self.replicas:
            self._ray.kill(replica)
        self._ray.shutdown()

    def _get(self, references: list[Any]) -> list[Any]:
        """Raises what a replica raised; OSError for one that died."""
        try:
            return self._ray.get(references)  # type: ignore[no-any-return]
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, Exception) else error from None
        except self._ray.exceptions.RayActorError as error:
            raise OSError(f"a replica that samples died: {str(error).splitlines()[0]}") from error


def _started(replicas: int, address: str | None) -> Any:
    try:
        import ray
    except ImportError as error:
        raise ValueError(
            'rollouts.replicas needs the package ray: pip install "deepseek_jax[ray]", or set it to 0'
        ) from error
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    where: dict[str, Any] = (
        {"address": address} if address else {"num_cpus": replicas, "include_dashboard": False}
    )
    ray.init(
        **where,
        log_to_driver=False,
        ignore_reinit_error=True,
        runtime_env={"env_vars": {"PYTHONPATH": path}},
    )
    return ray
