"""`Model`: a checkpoint ready to generate, to score and to look into; `deepseek_jax.load` makes one of a folder."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax.balancing.plan import Plan
from deepseek_jax.checks import choice, is_integer, require, shown
from deepseek_jax.config import MeshConfig, ModelConfig
from deepseek_jax.data.chat import ChatTemplate
from deepseek_jax.data.streaming import check_stop
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.inference import scoring
from deepseek_jax.inference.description import describe
from deepseek_jax.inference.offline import Completion, Offline, Rows, seeds_of
from deepseek_jax.model.decoding import decoding_config, prepare
from deepseek_jax.parallel.prepared import preparing
from deepseek_jax.serving.request import Request
from deepseek_jax.serving.sampling import Sampling

Text = str | Sequence[int]


class Stats(NamedTuple):
    """drafted: one token per row and forward pass of the main model; accepted: how many of them."""

    drafted: int
    accepted: int

    @property
    def acceptance(self) -> float:
        """Share of drafts that were accepted (the report: 85-90%)."""
        return self.accepted / max(1, self.drafted)

    @property
    def tokens_per_step(self) -> float:
        """Of each row; a row's last step may keep one token fewer (stop token, max_new_tokens)."""
        return 1.0 + self.acceptance


class Model:
    """Parameters with their config and tokenizer.

    Attributes:
        config: ModelConfig.
        params, balance_bias: as for `DeepSeekV3.apply`.
        tokenizer: None where the checkpoint has none; then pass token ids instead of text.
        mesh: None for one device; else over which devices `generate` runs.
        plan: of the slots that the experts of `params` lie in, over `mesh`; None: they lie in their order. What reads parameters
            itself (`logits`, `score`, `hf.save`) wants them in their order.
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
        plan: Plan | None = None,
    ):
        self.config, self.params, self.balance_bias = config, params, balance_bias
        self.tokenizer, self.mesh, self.plan = tokenizer, mesh, plan
        own = () if tokenizer is None else tokenizer.stop_ids
        self.stop_ids = own if stop_ids is None else tuple(stop_ids)
        self.last_stats: Stats | None = None
        self._offline = Offline(self)
        self._prepared: tuple[Any, Any] | None = None  # parameters, and the same as decoding reads them

    def __repr__(self) -> str:
        return describe(self.config, self.params, self.tokenizer, self.mesh)

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
            tokens = list(text) if isinstance(text, Iterable) else [None]
            require(all(map(is_integer, tokens)), f"{shown(text)} is neither text nor token ids")
            return [int(token) for token in tokens]
        return self._tokenizer().encode_prompt(text)

    def logits(self, text: Text | Sequence[Text]) -> Any:
        """Float32 logits [t, v] after each of the t tokens of a text (or list of ids); a list for a list of them.

        Raises ValueError for an empty text, one longer than the model's positions, and ids outside its vocabulary.
        """
        return self._each(scoring.all_logits, text)

    def score(self, text: Text | Sequence[Text]) -> Any:
        """Log-probability (nats) of each token given those before it, float32 [t - 1]; a list for a list of texts.

        Raises ValueError as `logits`, and for a single token.
        """
        return self._each(scoring.logprobs, text)

    def _each(self, fn: Any, text: Any) -> Any:
        require(self.plan is None, "experts lie in slots, for generation: load without redundant to score")
        text = _as_lists(text)
        if not _is_single(text):
            return [self._each(fn, one) for one in text]
        return fn(self.params, self.config, self._ids(text), self.balance_bias)

    def generate(
        self,
        prompts: Text | Sequence[Text],
        max_new_tokens: int = 128,
        *,
        stop: str | Sequence[str] = (),
        stop_ids: Sequence[int] | None = None,
        logprobs: bool = False,
        speculative: bool = False,
        seed: int | Sequence[int] = 0,
        **sampling: Any,
    ) -> Any:
        """Continuations: a text for a text, ids for ids, a list for a list of them.

        Args:
            stop: text that ends a row, and is left out. Rows of ids keep the tokens that it is made of.
            stop_ids: default: the checkpoint's own.
            logprobs: give a `Completion` for each prompt, with log-probabilities and why it ended.
            speculative: draft with the MTP module (the same tokens; `last_stats` has the acceptance).
            seed: one, of which each row has a stream of its own, or one for each row.
            sampling: temperature (0, the default, is greedy), top_p, top_k, min_p, repetition_penalty: see
                `sampling.Sampling`.

        Raises:
            ValueError: what `serving.request.Request.check` refuses; speculative without an MTP module.
        """
        prompts = _as_lists(prompts)
        single = _is_single(prompts) and len(prompts) > 0
        many: Sequence[Any] = [prompts] if single else prompts
        requests = self._requests(many, max_new_tokens, _sampling(sampling), stop_ids, seed)
        *_, rows = self._turns(many, requests, stop, speculative)
        outs: list[Any] = rows.completions()
        if not logprobs:
            outs = [x.text if isinstance(p, str) else x.tokens for p, x in zip(many, outs, strict=True)]
        return outs[0] if single else outs

    def completions(
        self,
        prompts: Sequence[Text],
        max_new_tokens: int = 128,
        *,
        stop: str | Sequence[str] = (),
        stop_ids: Sequence[int] | None = None,
        speculative: bool = False,
        seed: int | Sequence[int] = 0,
        **sampling: Any,
    ) -> Iterator[tuple[int, Completion]]:
        """Yields the number of a prompt and its `Completion` as soon as that is whole, of many prompts. The arguments are those
        of `generate`."""
        requests = self._requests(prompts, max_new_tokens, _sampling(sampling), stop_ids, seed)
        for rows in self._turns(prompts, requests, stop, speculative):
            yield from rows.finished()

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
        requests = self._requests([prompt], max_new_tokens, _sampling(sampling), stop_ids, seed)
        self._tokenizer()
        for rows in self._turns([prompt], requests, stop, speculative):
            yield rows.new_text()

    def chat(self, messages: Sequence[Mapping[str, Any]], max_new_tokens: int = 512, **kwargs: Any) -> str:
        """The assistant's next turn; append it to `messages` as {"role": "assistant"} to go on. For the other arguments
        see `stream_chat`."""
        return "".join(self.stream_chat(messages, max_new_tokens, **kwargs))

    def stream_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        max_new_tokens: int = 512,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Iterator[str]:
        """`chat`, in pieces, while it is generated.

        Args:
            tools: JSON schemas of functions that it may call.
            chat_template_kwargs: the template's switches, as {"enable_thinking": False}.
            kwargs: as for `stream`.
        """
        ids = self._tokenizer().encode_chat(messages, tools=tools, **(chat_template_kwargs or {}))
        return self.stream(ids, max_new_tokens, **kwargs)

    # --- the parts of `generate` and `stream` ---

    def ready(self, keep: bool = True) -> Any:
        """The parameters as decoding reads them, made once for `self.params`, or, not to be kept, for this call."""
        if self._prepared is None or self._prepared[0] is not self.params:
            experts = self.config.n_routed_experts
            if self.mesh is None:
                made = prepare(self.params, decoding_config(self.config))
            else:
                slots = self.plan is not None, self.plan is not None and self.plan.experts > experts
                made = preparing(self.config, self.mesh, None, *slots)(self.params)
            if not keep:
                return made
            self._prepared = self.params, made
        return self._prepared[1]

    def _requests(
        self, prompts: Sequence[Text], max_new_tokens: int, sampling: Sampling, stop_ids: Any, seed: Any
    ) -> list[Request]:
        asked = f"max_new_tokens={shown(max_new_tokens)} must be an integer >= 1"
        require(is_integer(max_new_tokens) and max_new_tokens >= 1, asked)
        max_new_tokens = int(max_new_tokens)  # NumPy's and JAX's count, too
        stops = self.stop_ids if stop_ids is None else stop_ids
        require(isinstance(stops, Iterable), f"stop_ids={shown(stops)} must be token ids")
        rows = [self._ids(prompt) for prompt in prompts]
        require(
            bool(rows) and all(rows),
            "generation needs at least one prompt, and each needs at least one token",
        )
        longest, positions = max(map(len, rows)), self.config.max_position_embeddings
        require(
            longest + max_new_tokens <= positions,
            f"prompt of {longest} tokens + max_new_tokens={max_new_tokens} exceeds max_position_embeddings={positions}",
        )
        return [
            Request(str(i), ids, max_new_tokens, sampling, seed=seed, stop_ids=tuple(stops))
            for i, (ids, seed) in enumerate(zip(rows, seeds_of(seed, len(rows)), strict=True))
        ]

    def _turns(
        self,
        prompts: Sequence[Text],
        requests: list[Request],
        stop: str | Sequence[str],
        drafts: bool,
    ) -> Iterator[Rows]:
        """Yields what all rows have after each turn of the engine, the same object each time."""
        stops = check_stop(stop)
        if stops:
            self._tokenizer()
        call = self._offline.call(requests, drafts)
        # A continuation of text goes on from it; one of ids is a text of its own.
        before = [r.prompt if isinstance(p, str) else () for p, r in zip(prompts, requests, strict=True)]
        rows = Rows(requests, self.tokenizer, stops, before)
        for updates in self._offline.answers(call):
            for request_id in rows.push(updates):
                call.engine.abort(request_id, "stop")
            yield rows
        if drafts:
            self.last_stats = Stats(call.engine.stats.drafted, call.engine.stats.accepted)


def _sampling(settings: Mapping[str, Any]) -> Sampling:
    for name in settings:
        choice("sampling setting", name, tuple(field.name for field in dataclasses.fields(Sampling)))
    return Sampling(**settings)


def _as_lists(prompts: Any) -> Any:
    """Arrays of ids as lists, of NumPy or JAX. Raises ValueError for what is neither text, nor ids, nor several."""
    prompts = prompts.tolist() if hasattr(prompts, "tolist") else prompts
    require(isinstance(prompts, Sequence), f"{shown(prompts)} is neither text nor token ids")
    return prompts


def _is_single(prompts: Any) -> bool:
    """Whether this is one text or one list of ids, and not a list of such."""
    return isinstance(prompts, str) or len(prompts) == 0 or isinstance(prompts[0], int | np.integer)
