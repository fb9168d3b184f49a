"""`deepseek_jax.load(path) -> Model`: a checkpoint, ready to generate, to score and to look into.

Prompts are padded to few lengths, so that a notebook compiles once per length and not once per prompt.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax import now
from deepseek_jax.config import Config, MeshConfig, ModelConfig, build
from deepseek_jax.data import text_files
from deepseek_jax.data.chat import ChatTemplate
from deepseek_jax.data.special_tokens import stop_ids as ids_that_stop
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.inference.batch import Completion, Request, completions, size_for
from deepseek_jax.inference.driver import Method, stream
from deepseek_jax.inference.generate import plain
from deepseek_jax.inference.over_mesh import over_mesh, parameter_shardings, programs
from deepseek_jax.inference.sampling import Sampling
from deepseek_jax.inference.speculative import Stats, check_speculative, speculative, stats
from deepseek_jax.inference.text import TextRow, check_stop
from deepseek_jax.json_files import read_object
from deepseek_jax.model.decoding import decoding_config, prepare
from deepseek_jax.model.layers import logits
from deepseek_jax.model.layout import single_device
from deepseek_jax.model.transformer import Inputs, forward

Text = str | Sequence[int]


@functools.partial(jax.jit, static_argnames=("cfg",))
def _logits(params: Any, cfg: ModelConfig, tokens_bt: jax.Array, bias_le: Any) -> jax.Array:
    h_btd, _ = forward(params, cfg, Inputs(tokens_bt), bias_le, single_device(), mtp=False)
    return logits(params, h_btd)


@jax.jit
def _token_scores(logits_btv: jax.Array, tokens_bt: jax.Array) -> jax.Array:
    """Log-probability of token i + 1 at each position i, [b, t - 1]."""
    log_prob = jax.nn.log_softmax(logits_btv[:, :-1], axis=-1)
    return jnp.take_along_axis(log_prob, tokens_bt[:, 1:, None], axis=-1)[..., 0]


def _count(n: int) -> str:
    """1.2B, 340M, 56k."""
    size, unit = next((s, u) for s, u in ((1e9, "B"), (1e6, "M"), (1e3, "k"), (1, "")) if n >= s or s == 1)
    return f"{n / size:.3g}{unit}"


def _mesh_text(mesh: MeshConfig) -> str:
    return ", ".join(f"{axis}={getattr(mesh, axis)}" for axis in ("data", "node", "local", "tensor"))


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
        self._prepared: tuple[Any, Any] | None = None  # parameters, and the same as decoding reads them

    def __repr__(self) -> str:
        cfg, known = self.config, "no tokenizer"
        if self.tokenizer is not None:
            known = f"tokenizer of {self.tokenizer.vocab_size:,} ids"
        parts = (
            f"{cfg.num_hidden_layers} layers ({cfg.num_moe_layers} with {cfg.n_routed_experts} experts)",
            f"{_count(cfg.num_params())} parameters, {_count(cfg.num_active_params())} active",
            jax.tree.leaves(self.params)[0].dtype.name,
            f"{cfg.max_position_embeddings:,} positions",
            known,
            *([] if self.mesh is None else [f"over {_mesh_text(self.mesh)}"]),
        )
        return f"Model({'; '.join(parts)})"

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
        padded = np.zeros((1, size_for(len(ids))), np.int32)
        padded[0, : len(ids)] = ids
        return _logits(self.params, cfg, padded, self.balance_bias), padded

    def logits(self, text: Text | Sequence[Text]) -> Any:
        """Float32 logits [t, v] after each of the t tokens of a text (or list of ids); a list for a list of them.

        Raises ValueError for an empty text, one longer than the model's positions, and ids outside its vocabulary.
        """
        if not _is_single(text):
            return [self.logits(one) for one in text]  # type: ignore[arg-type]
        ids = self._ids(text)  # type: ignore[arg-type]
        if not ids:
            raise ValueError("logits needs at least one token")
        return np.asarray(self._padded_logits(ids)[0])[0, : len(ids)]

    def score(self, text: Text | Sequence[Text]) -> Any:
        """Log-probability (nats) of each token given those before it, float32 [t - 1]; a list for a list of texts.

        Raises ValueError as `logits`, and for a single token.
        """
        if not _is_single(text):
            return [self.score(one) for one in text]  # type: ignore[arg-type]
        ids = self._ids(text)  # type: ignore[arg-type]
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
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        stop: str | Sequence[str] = (),
        stop_ids: Sequence[int] | None = None,
        logprobs: bool = False,
        speculative: bool = False,
        seed: int | Sequence[int] = 0,
    ) -> Any:
        """Continuations: a text for a text, ids for ids, a list for a list of them.

        Args:
            temperature, top_p, top_k, min_p, repetition_penalty: see `sampling.Sampling`; temperature 0 is greedy.
            stop: text that ends a row, and is left out. Rows of ids keep the tokens that it is made of.
            stop_ids: default: the checkpoint's own.
            logprobs: give a `Completion` for each prompt, with log-probabilities and why it ended.
            speculative: draft with the MTP module (same distribution; `last_stats` has the acceptance).
            seed: one, of which each row has a stream of its own, or one for each row.

        Raises:
            ValueError: see `batch.Request`; speculative over a mesh, or with a repetition penalty.
        """
        single = _is_single(prompts) and len(prompts) > 0
        many: Sequence[Any] = [prompts] if single else prompts
        sampling = Sampling(temperature, top_p, top_k, min_p, repetition_penalty)
        request = self._request(many, max_new_tokens, sampling, stop_ids, seed)
        rows = _result(self._generation(request, _texts(many, request), stop, speculative, show=False))
        outs: list[Any] = rows
        if not logprobs:
            outs = [
                row.text if isinstance(prompt, str) else row.tokens
                for prompt, row in zip(many, rows, strict=True)
            ]
        return outs[0] if single else outs

    def stream(
        self,
        prompt: Text,
        max_new_tokens: int = 128,
        *,
        stop: str | Sequence[str] = (),
        stop_ids: Sequence[int] | None = None,
        speculative: bool = False,
        seed: int = 0,
        **sampling: Any,
    ) -> Iterator[str]:
        """The text of `generate` for one prompt, in pieces, while it is generated. `sampling`: as there."""
        request = self._request([prompt], max_new_tokens, Sampling(**sampling), stop_ids, seed)
        for pieces in self._generation(request, _texts([prompt], request), stop, speculative, show=True):
            yield pieces[0]

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
        return "".join(
            self.stream_chat(
                messages, max_new_tokens, tools=tools, chat_template_kwargs=chat_template_kwargs, **kwargs
            )
        )

    def stream_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        max_new_tokens: int = 512,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Iterator[str]:
        """`chat`, in pieces, while it is generated."""
        ids = self._tokenizer().encode_chat(messages, tools=tools, **(chat_template_kwargs or {}))
        return self.stream(ids, max_new_tokens, **kwargs)

    # --- the parts of `generate` and `stream` ---

    def _request(
        self, prompts: Sequence[Text], max_new_tokens: int, sampling: Sampling, stop_ids: Any, seed: Any
    ) -> Request:
        stops = self.stop_ids if stop_ids is None else stop_ids
        known = None if self.tokenizer is None else min(self.tokenizer.vocab_size, self.config.vocab_size)
        return Request([self._ids(p) for p in prompts], max_new_tokens, sampling, stops, seed, known)

    def _ready(self) -> Any:
        """The parameters as decoding reads them, made once for `self.params`."""
        if self._prepared is None or self._prepared[0] is not self.params:
            if self.mesh is None:
                ready = prepare(self.params, decoding_config(self.config))
            else:
                ready = programs(self.config, self.mesh).prepare(self.params)
            self._prepared = self.params, ready
        return self._prepared[1]

    def _method(self, request: Request, drafts: bool) -> Method:
        cfg, bias = self.config, self.balance_bias
        if not drafts:
            if self.mesh is not None:
                return over_mesh(self.params, cfg, self.mesh, bias, self._ready())
            return plain(self.params, cfg, bias, self._ready())
        if self.mesh is not None:
            raise ValueError(
                "speculative decoding runs on one device: leave out speculative=True or the mesh"
            )
        check_speculative(request.sampling)
        return speculative(self.params, cfg, bias, self._ready())

    def _generation(
        self,
        request: Request,
        before: Sequence[Sequence[int]],
        stop: str | Sequence[str],
        drafts: bool,
        show: bool,
    ) -> Generator[list[str], None, list[Completion]]:
        """Yields the text that each row has got, if it is to be shown; returns what came out.

        before: the ids that the text of each row goes on from.
        """
        stops = check_stop(stop)
        method = self._method(request, drafts)
        texts = [TextRow(self._tokenizer(), stops, ids) for ids in before] if show or stops else []
        states, ended = stream(method, self.config, request, first=1 if show else 8), None
        with contextlib.suppress(StopIteration):
            while True:
                state = states.send(ended)
                if texts:
                    rows = completions(state.out, request)
                    new = [text.push(row.tokens[text.count :]) for text, row in zip(texts, rows, strict=True)]
                    ended = np.zeros(len(state.token_b), bool)
                    ended[: len(texts)] = [text.ended for text in texts]
                if show:
                    yield new
        if drafts:
            self.last_stats = stats(state)
        rest = [text.close() for text in texts]
        if show:
            yield rest
        rows = completions(state.out, request)
        if texts:
            return [_cut(row, text) for row, text in zip(rows, texts, strict=True)]
        if self.tokenizer is None:
            return rows
        return [self._with_text(row, ids) for row, ids in zip(rows, before, strict=True)]

    def _with_text(self, row: Completion, before: Sequence[int]) -> Completion:
        text = self._tokenizer().text_after(before, row.tokens, skip_special=True)
        return dataclasses.replace(row, text=text)


def _texts(prompts: Sequence[Text], request: Request) -> list[Sequence[int]]:
    """The ids of the prompts that are texts, which continuations go on from; () for those that came as ids."""
    return [
        ids if isinstance(prompt, str) else () for prompt, ids in zip(prompts, request.prompts, strict=True)
    ]


def _cut(row: Completion, text: TextRow) -> Completion:
    """A row with its text, up to a stop string where one came."""
    if not text.ended:
        return dataclasses.replace(row, text=text.text)
    n = text.count
    return Completion(row.tokens[:n], "stop", row.logprobs[:n], row.sampled_logprobs[:n], text.text)


def _is_single(prompts: Any) -> bool:
    """Whether this is one text or one list of ids, and not a list of such."""
    return isinstance(prompts, str) or len(prompts) == 0 or isinstance(prompts[0], int | np.integer)


def _result(generation: Generator[list[str], None, list[Completion]]) -> list[Completion]:
    while True:
        try:
            next(generation)
        except StopIteration as end:
            return end.value


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
    with now.doing(f"loading {path}"):
        return _load(Path(path).expanduser(), step, ema, dtype, mtp, shardings, mesh)


def _load(
    folder: Path,
    step: int | None,
    ema: bool,
    dtype: str | None,
    mtp: bool,
    shardings: Any,
    mesh: MeshConfig | None,
) -> Model:
    from deepseek_jax import hf

    if (folder / "config.json").is_file():
        if mesh is not None:
            shardings = parameter_shardings(hf.Checkpoint(folder, mtp).cfg, mesh)
        text = _text_side(folder, read_object(folder / "config.json"))
        return Model(*hf.load(folder, dtype=dtype, mtp=mtp, shardings=shardings), *text, mesh)
    if (folder / "checkpoints").is_dir():
        from deepseek_jax.training.checkpoint import load_params

        def read(item: Path) -> Any:
            return hf.load_tree(item, lambda cfg: None if mesh is None else parameter_shardings(cfg, mesh))

        saved, params, bias, meta = load_params(folder / "checkpoints", step, ema, read)
        text = _text_side(folder, meta.get("huggingface", {}).get("config", {}))
        return Model(build(Config, saved).model, params, jnp.asarray(bias), *text, mesh)
    raise ValueError(f"{folder} holds neither config.json (Hugging Face) nor checkpoints/ (a training run)")


def _text_side(folder: Path, config: Mapping[str, Any]) -> tuple[Tokenizer | None, tuple[int, ...]]:
    """(tokenizer, ids that end a generation) of a folder; `config` is the model's config.json."""
    if (folder / text_files.TOKENIZER).is_file():
        tokenizer = Tokenizer.load(folder, config)
        return tokenizer, tokenizer.stop_ids
    return None, ids_that_stop(text_files.read(folder), config, None)
