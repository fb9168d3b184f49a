"""Small runs over a pipeline, and the same without one."""

import dataclasses

from deepseek_jax.config import Config
from tests.parallel import harness


def config(pipe, data=1, node=1, micro=4, model=None, precision="bf16", remat="none", **mesh):
    """micro: micro-batches of a device, of a sequence each."""
    return harness.config(
        (data, node),
        harness.SHALLOW | {"num_hidden_layers": 3, "first_k_dense_replace": 1} | (model or {}),
        train={"batch_size": data * node * micro, "grad_accumulation": micro, "remat": remat},
        mesh={"pipe": pipe} | mesh,
        precision=precision,
    )


def without(cfg: Config, remat: str = "none") -> Config:
    """The same run on the mesh without the pipeline."""
    plain = {"pipe": 1, "overlap": False, "zero": False, "stage_layers": (), "schedule": "auto"}
    mesh = dataclasses.replace(cfg.mesh, **plain)
    return dataclasses.replace(cfg, mesh=mesh, train=dataclasses.replace(cfg.train, remat=remat))


MTP = {"num_nextn_predict_layers": 1}
