"""The server's metrics, under vLLM's names, which routers and dashboards read."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from deepseek_jax.model.cache import PAGE
from deepseek_jax.serving.server.admission import Admission
from deepseek_jax.serving.server.generation import Sample
from deepseek_jax.serving.server.metrics import Counter, Histogram, Info, Labels, Read, ReadEach, text
from deepseek_jax.serving.transfer.traffic import Traffic

_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)  # fmt: skip

# What the engine counts (`engine.Stats`): metric, help, field.
_COUNTED = (
    ("prefix_cache_queries", "Tokens of prompts that were looked up in the prefix cache.", "cache_queries"),
    ("prefix_cache_hits", "Tokens of prompts that were found there.", "cache_hits"),
    ("num_preemptions", "Times that a sequence lost its pages and waited again.", "preemptions"),
    ("spec_decode_num_drafts", "Times that tokens were drafted.", "drafts"),
    ("spec_decode_num_draft_tokens", "Tokens that were drafted.", "drafted"),
    ("spec_decode_num_accepted_tokens", "Tokens that were drafted and kept.", "accepted"),
)


# What the engine knows of experts that move (`experts.Experts`): metric, help, how it is read, kind.
_OF_EXPERTS: tuple[tuple[str, str, Callable[[Any], float], str], ...] = (
    (
        "expert_plan_age_steps",
        "Of the plan where experts lie.",
        lambda x: x.planner.report().age_steps,
        "gauge",
    ),
    ("expert_plan_age_seconds", "Of the same.", lambda x: x.planner.report().age_s, "gauge"),
    ("expert_plan_waiting_seconds", "Of a new plan.", lambda x: x.planner.report().waiting_s, "gauge"),
    (
        "expert_balance",
        "Mean rows of a device over those of the fullest, at the last look.",
        lambda x: x.planner.report().balance,
        "gauge",
    ),
    ("expert_plans_total", "Plans that were moved to.", lambda x: x.planner.report().taken, "counter"),
    (
        "expert_plan_failures_total",
        "Plans that did not come.",
        lambda x: x.planner.report().failures,
        "counter",
    ),
    ("expert_layers_moved_total", "Layers whose experts were moved.", lambda x: x.moves, "counter"),
    ("expert_layers_to_move", "Layers that are still to be moved.", lambda x: x.left, "gauge"),
)

# Of prompts and their pages from one server to another (`transfer/traffic.py`): metric, help, label, what, kind.
_TRANSFERRED: tuple[tuple[str, str, str, Callable[[Traffic], Mapping[str, float]], str], ...] = (
    ("s_total", "Prompts from, or to, another server, by how it ended.", "result", Traffic.ends, "counter"),
    ("_bytes_total", "Bytes of pages that travelled.", "way", lambda t: t.moved, "counter"),
    ("_seconds_total", "Seconds in which they did.", "way", lambda t: t.seconds, "counter"),
    ("_megabytes_per_second", "Of all that travelled.", "way", Traffic.rates, "gauge"),
)


class Instruments:
    """Counts what clients get; what the engine alone knows is read from it.

    Attributes:
        engine: `serving.engine.Engine`; None: not there yet, and all its counts are 0.
    """

    def __init__(self, name: str, admission: Admission):
        self.engine: Any = None
        self._labels: Labels = (("model_name", name), ("engine", "0"))
        self.prompt = Counter("vllm:prompt_tokens_total", "Tokens of prompts, computed or found.")
        self.generated = Counter("vllm:generation_tokens_total", "Tokens of answers.")
        self.success = Counter(
            "vllm:request_success_total",
            "Sequences that the engine took and that ended.",
            ("finished_reason",),
        )
        self.first = Histogram("vllm:time_to_first_token_seconds", "From a request to its first token.")
        self.between = Histogram("vllm:inter_token_latency_seconds", "From a token to the next.", _BETWEEN)
        self.whole = Histogram("vllm:e2e_request_latency_seconds", "From a request to its end.")
        self.queue = Histogram("vllm:request_queue_time_seconds", "From a request until it runs.")
        self._metrics = (
            *(self.prompt, self.generated, self.success, self.first, self.between, self.whole, self.queue),
            Read("vllm:num_requests_running", "Sequences that run.", self._summed(lambda s: len(s.running))),
            Read("vllm:num_requests_waiting", "Sequences that wait.", self._summed(lambda s: len(s.waiting))),
            Read("vllm:kv_cache_usage_perc", "Share of the pages that are held, 0 to 1.", self._usage),
            Info("vllm:cache_config_info", "Pages of the cache, and tokens of one.", self._cache),
            *(
                Read(f"vllm:{name}_total", help, self._count(field), "counter")
                for name, help, field in _COUNTED
            ),
            Read("deepseek_jax:steps_total", "Turns of the engine.", self._count("steps"), "counter"),
            Read(
                "deepseek_jax:steps_overlapped_total",
                "Turns in which one half of the rows computed while the other's tokens travelled.",
                self._count("in_two"),
                "counter",
            ),
            Read("deepseek_jax:queued_sequences", "Without a first token.", lambda: admission.waiting),
            Read("deepseek_jax:queued_prompt_tokens", "Of those.", lambda: admission.waiting_tokens),
            *(
                ReadEach(f"deepseek_jax:transfer{name}", help, label, self._traffic(of), kind)
                for name, help, label, of, kind in _TRANSFERRED
            ),
        )

    def text(self) -> str:
        return text(self._labels, (*self._metrics, *self._of_experts()))

    # --- what happens ---

    def came(self, sample: Sample, tokens: int, when: float) -> None:
        """Tokens came; before `sample.first` and `sample.last` are set."""
        if sample.last is None:
            self.first.observe(when - sample.begun)
            self.queue.observe(sample.queued)
            if sample.counts_prompt:
                self.prompt.add(len(sample.request.prompt))
        elif tokens:
            self.between.observe((when - sample.last) / tokens, tokens)
        self.generated.add(tokens)

    def ended(self, sample: Sample, when: float) -> None:
        self.success.add(1, sample.reason or "")
        self.whole.observe(when - sample.begun)

    # --- what is read ---

    def _schedulers(self) -> list[Any]:
        return [] if self.engine is None else self.engine.schedulers

    def _summed(self, of: Callable[[Any], int]) -> Callable[[], float]:
        """Over the ranks."""
        return lambda: sum(map(of, self._schedulers()))

    def _usage(self) -> float:
        held, pages = self._summed(lambda s: s.pool.held)(), self._summed(lambda s: s.pool.pages)()
        return held / max(1, pages)

    def _cache(self) -> Labels:
        pages = int(self._summed(lambda s: s.pool.pages)())
        return ("block_size", str(PAGE)), ("num_gpu_blocks", str(pages))

    def _of_experts(self) -> list[Read]:
        experts = None if self.engine is None else self.engine.experts
        if experts is None:
            return []
        return [
            Read(f"deepseek_jax:{name}", help, functools.partial(read, experts), kind)
            for name, help, read, kind in _OF_EXPERTS
        ]

    def _traffic(self, of: Callable[[Traffic], Mapping[str, float]]) -> Callable[[], Mapping[str, float]]:
        return lambda: {} if self.engine is None else of(self.engine.traffic)

    def _count(self, field: str) -> Callable[[], float]:
        return lambda: 0 if self.engine is None else getattr(self.engine.stats, field)
