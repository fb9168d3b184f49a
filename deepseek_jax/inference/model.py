"""`deepseek_jax.load(path) -> Model`: a checkpoint, ready to generate, to score and to look into.

Prompts are padded to buckets of lengths, so that a notebook compiles once per bucket and not once per prompt.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.config import Config, MeshConfig, ModelConfig, build
from deepseek_jax.data import text_files
from deepseek_jax.data.chat import ChatTemplate
from deepseek_jax.data.special_tokens import stop_ids as ids_that_stop
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.inference.generate import BUCKET, generate
from deepseek_jax.inference.over_mesh import generate_over_mesh, parameter_shardings
from deepseek_jax.inference.sampling import Sampling
from deepseek_jax.inference.speculative import Stats, generate_speculative
from deepseek_jax.json_files import read_object
from deepseek_jax.model.layers import logits
from deepseek_jax.model.transformer import forward

Text = str | Sequence[int]


@functools.partial(jax.jit, static_argnames=("cfg",))
def _logits(params: Any, cfg: ModelConfig, tokens_bt: jax.Array, bias_le: Any) -> jax.Array:
    h_btd, _ = forward(params, cfg, tokens_bt, bias_le, mtp=False)
    return logits(params, h_btd)


@jax.jit
def _token_scores(logits_btv: jax.Array, tokens_bt: jax.Array) -> jax.Array:
    """Log-probability of token i + 1 at each position i, [b, t - 1]."""
    log_prob = jax.nn.log_softmax(logits_btv[:, :-1], axis=-1)
    return jnp.take_along_axis(log_prob, tokens_bt[:, 1:, None], axis=-1)[..., 0]


class Model:
    """Parameters with their config and tokenizer.

    Attributes:
        config: ModelConfig.
        params, balance_bias: as for `DeepSeekV3.apply`.
        tokenizer: None where the checkpoint has none; then pass token ids instead of text.
        mesh: None for one device; else over which devices `generate` runs.
        stop_ids: the ids that end a generation, if a call names no others.
        last_stats: acceptance of the last speculative generation, or None.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Any,
        balance_bias: Any = None,
        tokenizer: Tokenizer | None = None,
        stop_ids: Sequence[int] | None = None,
        mesh: MeshConfig | None = None,
    ):
        self.config, self.params, self.balance_bias = config, params, balance_bias
        self.tokenizer, self.mesh = tokenizer, mesh
        own = () if tokenizer is None else tokenizer.stop_ids
        self.stop_ids = own if stop_ids is None else tuple(stop_ids)
        self.last_stats: Stats | None = None

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError("this checkpoint has no tokenizer.json: pass token ids instead of text")
        return self.tokenizer

    @property
    def chat_template(self) -> ChatTemplate:
        """The tokenizer's. Raises ValueError where there is none."""
        return self._tokenizer().chat_template

    def _ids(self, text: Text) -> list[int]:
        if not isinstance(text, str):
            return [int(token) for token in text]
        return self._tokenizer().encode_prompt(text)

    def _padded_logits(self, ids: list[int]) -> tuple[jax.Array, np.ndarray]:
        """Logits and tokens of one row, padded on the right, which no token before sees."""
        cfg = self.config
        if len(ids) > cfg.max_position_embeddings:
            raise ValueError(
                f"{len(ids)} tokens exceed max_position_embeddings={cfg.max_position_embeddings}"
            )
        if min(ids) < 0 or max(ids) >= cfg.vocab_size:
            raise ValueError(
                f"token ids {min(ids)} to {max(ids)} exceed [0, vocab_size={cfg.vocab_size}): "
                "use the checkpoint's own tokenizer"
            )
        padded = np.zeros((1, -(-len(ids) // BUCKET) * BUCKET), np.int32)
        padded[0, : len(ids)] = ids
        return _logits(self.params, cfg, padded, self.balance_bias), padded

    def logits(self, text: Text) -> np.ndarray:
        """Float32 logits [t, v] after each of the t tokens of a text (or list of ids).

        Raises ValueError for an empty text, one longer than the model's positions, and ids outside its vocabulary.
        """
        ids = self._ids(text)
        if not ids:
            raise ValueError("logits needs at least one token")
        return np.asarray(self._padded_logits(ids)[0])[0, : len(ids)]

    def score(self, text: Text) -> np.ndarray:
        """Log-probability (nats) of each token given those before it, float32 [t - 1].

        Raises ValueError as `logits`, and for a single token.
        """
        ids = self._ids(text)
        if len(ids) < 2:
            raise ValueError(f"score needs at least two tokens, got {len(ids)}")
        return np.asarray(_token_scores(*self._padded_logits(ids)))[0, : len(ids) - 1]

    def generate(
        self,
        prompts: Text | Sequence[Text],
        max_new_tokens: int = 128,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop_ids: Sequence[int] | None = None,
        speculative: bool = False,
        seed: int = 0,
    ) -> Any:
        """Continuations: a text for a text, ids for ids, a list for a list of them.

        Args:
            temperature, top_p: 0 is greedy.
            stop_ids: default: the checkpoint's own.
            speculative: draft with the MTP module (same distribution; `last_stats` has the acceptance).

        Raises:
            ValueError: see `inference.generate.generate`; or speculative over a mesh.
        """
        if speculative and self.mesh is not None:
            raise ValueError(
                "speculative decoding runs on one device: leave out speculative=True or the mesh"
            )
        single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int | np.integer))
        many: Sequence[Any] = [prompts] if single else prompts
        stop_ids = self.stop_ids if stop_ids is None else stop_ids
        kwargs: dict[str, Any] = {
            "balance_bias": self.balance_bias,
            "sampling": Sampling(temperature, top_p),
            "stop_ids": stop_ids,
            "seed": seed,
            "num_ids": None
            if self.tokenizer is None
            else min(self.tokenizer.vocab_size, self.config.vocab_size),
        }
        ids = [self._ids(p) for p in many]
        if speculative:
            rows, self.last_stats = generate_speculative(
                self.params, self.config, ids, max_new_tokens, **kwargs
            )
        elif self.mesh is not None:
            rows = generate_over_mesh(self.params, self.config, ids, max_new_tokens, self.mesh, **kwargs)
        else:
            rows = generate(self.params, self.config, ids, max_new_tokens, **kwargs)
        outs = [self._text(row) if isinstance(p, str) else row for p, row in zip(many, rows, strict=True)]
        return outs[0] if single else outs

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        max_new_tokens: int = 512,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> str:
        """The assistant's next turn; append it to `messages` as {"role": "assistant"} to go on.

        Args:
            tools: JSON schemas of functions that it may call.
            chat_template_kwargs: the template's switches, as {"enable_thinking": False}.
            kwargs: as for `generate`.
        """
        ids = self._tokenizer().encode_chat(messages, tools=tools, **(chat_template_kwargs or {}))
        return self._text(self.generate(ids, max_new_tokens, **kwargs))

    def _text(self, ids: Sequence[int]) -> str:
        return self._tokenizer().decode(ids, skip_special=True)


def load(
    path: str | Path,
    *,
    step: int | None = None,
    ema: bool = False,
    dtype: str | None = None,
    mtp: bool = True,
    shardings: Any = None,
    mesh: MeshConfig | None = None,
) -> Model:
    """A Hugging Face folder (config.json and safetensors) or the output folder of a training run.

    Args:
        step, ema: which checkpoint of a training run, and whether its averaged parameters.
        dtype, mtp, shardings: of the parameters of a Hugging Face checkpoint, see `deepseek_jax.hf.load`.
        mesh: generate over these devices, which hold the experts among them (`inference/over_mesh.py`); None: on one.

    Raises:
        ValueError: neither of the two, or a damaged checkpoint; names the file. Or a mesh that does not fit.
    """
    if mesh is not None and shardings is not None:
        raise ValueError("a mesh brings its own shardings: give one of mesh and shardings")
    folder = Path(path).expanduser()
    from deepseek_jax import hf

    if (folder / "config.json").is_file():
        if mesh is not None:
            shardings = parameter_shardings(hf.Checkpoint(folder, mtp).cfg, mesh)
        text = _text_side(folder, read_object(folder / "config.json"))
        return Model(*hf.load(folder, dtype=dtype, mtp=mtp, shardings=shardings), *text, mesh)
    if (folder / "checkpoints").is_dir():
        from deepseek_jax.training.checkpoint import load_params

        saved, params, bias, meta = load_params(folder / "checkpoints", step, ema)
        cfg = build(Config, saved).model
        params = hf.dequantised(params, cfg)  # of a converted checkpoint, which may have stayed in FP8
        where = None if mesh is None else parameter_shardings(cfg, mesh)
        text = _text_side(folder, meta.get("huggingface", {}).get("config", {}))
        return Model(cfg, jax.device_put(params, where), jnp.asarray(bias), *text, mesh)
    raise ValueError(f"{folder} holds neither config.json (Hugging Face) nor checkpoints/ (a training run)")


def _text_side(folder: Path, config: Mapping[str, Any]) -> tuple[Tokenizer | None, tuple[int, ...]]:
    """(tokenizer, ids that end a generation) of a folder; `config` is the model's config.json."""
    if (folder / text_files.TOKENIZER).is_file():
        tokenizer = Tokenizer.load(folder, config)
        return tokenizer, tokenizer.stop_ids
    return None, ids_that_stop(text_files.read(folder), config, None)
