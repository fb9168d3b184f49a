"""Files of texts to learn recall from, which stages of a context extension read beside their other sources."""

import json

from deepseek_jax import now
from deepseek_jax.data.text_files import write_file
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.evaluation.needle import documents, hay_of
from deepseek_jax.parallel.processes.together import from_first, is_first
from deepseek_jax.posttraining.extend import ExtendConfig, Stage, recall_file

_SPARE = 1.5  # times the tokens that a stage reads, so that few are read twice


def write_recall(cfg: ExtendConfig, stages: list[Stage]) -> None:
    """Writes the file of each length at which `stages` read one, as long as the longest of them needs; a function of the config
    alone. All processes call it; they go on when the first has written."""
    needed: dict[int, float] = {}
    for stage in stages:
        seq_len = stage.cfg.data.seq_len
        share = dict(stage.cfg.data.weighted_sources()).get(str(recall_file(cfg, seq_len)), 0.0)
        tokens = share * stage.cfg.train.steps * stage.cfg.train.batch_size * seq_len
        needed[seq_len] = max(needed.get(seq_len, 0.0), tokens)
    if is_first() and any(needed.values()):
        with now.doing("writing texts to learn recall from"):
            for seq_len, tokens in needed.items():
                if tokens:
                    _write(cfg, stages[0], seq_len, int(_SPARE * tokens))
    from_first(0)


def _write(cfg: ExtendConfig, stage: Stage, seq_len: int, tokens: int) -> None:
    assert stage.cfg.data.tokenizer is not None
    tokenizer = Tokenizer.load(stage.cfg.data.tokenizer)
    hay = hay_of(cfg.data, cfg.needle, tokenizer, held_out=False)
    tokens = max(tokens, 40 * seq_len)  # enough for windows of both splits
    texts = documents(cfg.needle, hay, tokenizer, tokens, seq_len, cfg.data.seed)
    lines = "".join(f"{json.dumps({cfg.data.text_field: text})}\n" for text in texts).encode()
    path = recall_file(cfg, seq_len)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file() or path.read_bytes() != lines:
        write_file(path, lines)
