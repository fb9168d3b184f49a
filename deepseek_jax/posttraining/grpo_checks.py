"""What would end a GRPO run later on, in a message of its own: looked at before it begins. All raise ValueError."""

from pathlib import Path

from jax.sharding import AbstractMesh, Mesh

from deepseek_jax.checkpoints.files import read_meta
from deepseek_jax.checks import require
from deepseek_jax.posttraining.experience import windows
from deepseek_jax.posttraining.grpo_settings import GRPOConfig


def check_windows(cfg: GRPOConfig, mesh: Mesh | AbstractMesh) -> None:
    """For windows of a length that does not divide over the mesh: batches of short answers would be the first to need it."""
    of_each_length, tensor = windows(cfg.data.seq_len, cfg.rollouts.buckets), mesh.shape["tensor"]
    require(
        not any(window % tensor for window in of_each_length),
        f"windows of {of_each_length} tokens (data.seq_len={cfg.data.seq_len}, rollouts.buckets={cfg.rollouts.buckets}) do not "
        f"all divide over tensor={tensor} devices",
    )


def check_held_out(cfg: GRPOConfig, found: int, processes: int) -> None:
    """For fewer held-out prompts than processes, each of which answers some."""
    asked = min(found, cfg.rollouts.eval_prompts)
    require(
        asked >= processes,
        f"{asked} held-out prompts for {processes} processes, each of which answers some: raise rollouts.eval_prompts="
        f"{cfg.rollouts.eval_prompts}, or hold out more than {found}",
    )


def check_checkpoint(cfg: GRPOConfig, folder: Path, step: int) -> None:
    """For a checkpoint that lies inside of a rollout by the present `rollouts.updates`; for one without the reference that
    `loss.beta` asks for now, or with one that nothing weighs any more."""
    updates, beta = cfg.rollouts.updates, cfg.loss.beta
    require(
        step % updates == 0,
        f"step {step} in {folder} is no multiple of rollouts.updates={updates}, and would lie inside of a rollout: set "
        "rollouts.updates as it was, or to a divisor of the step",
    )
    before = read_meta(folder / str(step))["config"].get("loss", {}).get("beta", beta)
    require(
        bool(before) == bool(beta),
        f"loss.beta={beta}, and at step {step} it was {before}: a checkpoint has a reference where beta is above 0 alone. Leave it "
        "so, or begin another run from this one's weights (train.init_from)",
    )
