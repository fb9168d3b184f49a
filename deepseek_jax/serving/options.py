"""How an engine runs; all that a server's flags may change."""

import dataclasses
import math
from typing import Any

import jax

from deepseek_jax.checks import choice, is_integer, require, shown
from deepseek_jax.config import ModelConfig
from deepseek_jax.model.cache import PAGE, empty_pages
from deepseek_jax.model.platform import on_cpu
from deepseek_jax.serving.sizes import Sizes

CACHES = ("model", "fp8")
OVERLAP = ("off", "auto")
CPU_CACHE = 2**30  # bytes of pages on a CPU, at most, where nobody says how many
GPU_SHARE = 0.8  # of what is free on a GPU


@dataclasses.dataclass(frozen=True)
class Options:
    """The defaults suit a laptop and a GPU.

    Attributes:
        rows: sequences that run at the same time, on each device.
        max_model_len: tokens of a sequence, prompt and answer; None: as many as the model has positions.
        chunk: tokens of prompts that go through the model at once; None: 256 on a CPU, 2,048 on a GPU.
        pages: of the cache, of 64 tokens, on each device; None: as many as all rows need, or as memory allows.
        cache: "model", latents in the dtype of decoding, or "fp8".
        stall: beside decode rows, chunks take at most so many times as long as the rows, or 20 ms if that is longer, but at
            least one smallest chunk runs: what a prompt that comes adds to the time between two tokens of others.
        waiting: requests that may wait, at most, for one to end.
        invariant: a sequence's tokens and log-probabilities are the same bits whatever runs beside it. One size of decode rows
            and of chunks, and no sequence begins before all its pages are there. Not for experts that move or have copies.
        steady: the order of programs does not depend on how long they take: the same requests, submitted at once, are answered in
            the same bits. Prompts then hold up those who decode as long as they take.
        drafts: True, False, or "auto": whether the MTP module drafts, always, never, or where it pays.
        redundant: over a mesh, experts more than the model has, in each layer: copies of those with much load, which share it. All
            experts then lie where plans say, and move. 0: they move, and none has copies; None: they stay where they are.
        replan: steps from one look at the loads of experts to the next (`serving/experts.py`).
        replan_below: a look makes a new plan if the mean load of a device is less than this part of that of the fullest; 1: always,
            if there is a better one.
        expert_loads: file of loads that the first plan is made for, if it is there; it is written at the end.
        overlap: over a mesh, from how many tokens of a device on a program has its rows in two halves, of which one computes while
            the other's tokens travel; "auto": where it pays by bandwidths (`overlap.py`), never on CPUs; "off": never.
    """

    rows: int = 32
    max_model_len: int | None = None
    chunk: int | None = None
    pages: int | None = None
    cache: str = "model"
    stall: float = 2.0
    waiting: int = 256
    invariant: bool = False
    steady: bool = False
    drafts: bool | str = False
    redundant: int | None = None
    replan: int = 1000
    replan_below: float = 1.0
    expert_loads: str | None = None
    overlap: int | str = "off"

    def __post_init__(self):
        for name in ("rows", "max_model_len", "chunk", "pages", "waiting", "redundant", "replan"):
            value = getattr(self, name)
            least = 0 if name in ("waiting", "redundant") else 1
            optional = value is None and name in ("max_model_len", "chunk", "pages", "redundant")
            good = optional or (is_integer(value) and value >= least)
            require(good, f"{name}={shown(value)} must be an integer >= {least}")
        choice("cache", self.cache, CACHES)
        require(
            isinstance(self.stall, int | float) and self.stall > 0 and math.isfinite(self.stall),
            f"stall={shown(self.stall)} must be a number > 0",
        )
        require(
            self.drafts in (True, False, "auto"), f"drafts={shown(self.drafts)} must be True, False or 'auto'"
        )
        require(
            not self.steady or self.drafts != "auto",
            "steady=True with drafts='auto': whether these pay is measured; set drafts to True or False",
        )
        require(
            isinstance(self.replan_below, int | float) and 0 < self.replan_below <= 1,
            f"replan_below={shown(self.replan_below)} must be a number in (0, 1]",
        )
        require(
            self.expert_loads is None or self.redundant is not None,
            f"expert_loads={shown(self.expert_loads)} is for experts that move: give redundant, 0 or more, or leave it out",
        )
        require(
            not self.invariant or self.overlap == "off",
            f"invariant=True with overlap={self.overlap}: halves of an odd number of rows differ in size, and a row's sums may depend "
            "on the half that it is in: leave one of them out",
        )
        require(
            not self.invariant or self.redundant is None,
            f"invariant=True with redundant={self.redundant}: which copy of an expert a token goes to depends on the others, and so do "
            "the last bits of its sum; leave one out",
        )
        require(
            self.overlap in OVERLAP or (is_integer(self.overlap) and int(self.overlap) >= 1),
            f"overlap={shown(self.overlap)} must be 'off', 'auto' or an integer >= 1, tokens of a device from which on",
        )

    def sizes(self, cfg: ModelConfig) -> Sizes:
        """Raises ValueError for more tokens than the model has positions."""
        longest = cfg.max_position_embeddings if self.max_model_len is None else self.max_model_len
        require(
            longest <= cfg.max_position_embeddings,
            f"max_model_len={longest} exceeds max_position_embeddings={cfg.max_position_embeddings}",
        )
        chunk = (256 if on_cpu() else 2048) if self.chunk is None else self.chunk
        return Sizes(self.rows, longest, max(PAGE, min(chunk, longest)), self.invariant)

    def pages_for(self, cfg: ModelConfig, layers: int, beside: int = 0, device: Any = None) -> int:
        """Pages on one device. beside: bytes that are still to be taken there. Raises ValueError if there is no room for one whole
        sequence."""
        sizes = self.sizes(cfg)
        if self.pages is not None:
            return self.pages
        fp8 = self.cache == "fp8"
        one = (
            math.prod((x := jax.eval_shape(lambda: empty_pages(cfg, layers, 1, fp8))).shape)
            * x.dtype.itemsize
        )
        stats = None if on_cpu() else (device or jax.local_devices()[0]).memory_stats()
        free = (
            CPU_CACHE
            if stats is None
            else GPU_SHARE * (stats["bytes_limit"] - stats["bytes_in_use"] - beside)
        )
        pages = min(sizes.slots * sizes.pages_each, max(0, int(free)) // one)
        if stats is None:  # a CPU has what one whole sequence needs
            pages = max(pages, sizes.pages_each)
        require(
            pages >= sizes.pages_each,
            f"a sequence of max_model_len={sizes.max_model_len} takes {sizes.pages_each} pages of {one / 2**20:.2f} MiB, and "
            f"memory has room for {pages}: set a smaller max_model_len, or pages",
        )
        return pages
