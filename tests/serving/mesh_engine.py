"""The engine over a mesh of eight devices, few sizes, beside the engine of one device: for tests and their long form."""

import dataclasses
import functools

import jax
import numpy as np

from deepseek_jax.config import MeshConfig
from deepseek_jax.model.decoding import decoding_config
from deepseek_jax.parallel.prepared import parameter_shardings, preparing
from deepseek_jax.serving.engine import Engine
from deepseek_jax.serving.options import Options
from deepseek_jax.serving.over_mesh import OverMesh
from deepseek_jax.serving.pace import Pace
from deepseek_jax.serving.programs import Weights
from deepseek_jax.serving.request import Request, Token
from deepseek_jax.serving.sizes import Sizes
from tests.oracle.tiny import weights
from tests.serving.greedy import greedy
from tests.tiny_run import tiny

CFG = dataclasses.replace(
    tiny().model,
    num_hidden_layers=1,
    first_k_dense_replace=0,
    max_position_embeddings=512,
    initializer_range=0.2,
)
MESHES = {
    "heads": MeshConfig(data=1, node=2, local=2, tensor=2),
    "replicas": MeshConfig(data=2, node=2, local=2),
    "flat": MeshConfig(data=2, node=1, local=4),
}


@dataclasses.dataclass(frozen=True)
class FewSizes(Sizes):
    """One size of decode rows, a short and a long chunk."""

    @property
    def rows(self):
        return (self.slots,)

    @property
    def chunks(self):
        return ((2, 16), (1, self.chunk))


SIZES = FewSizes(slots=2, max_model_len=256, chunk=128)
OPTIONS = Options(rows=2, max_model_len=256, chunk=128)


@functools.cache
def model(seed: int = 4):
    return jax.tree.map(jax.numpy.asarray, weights(CFG, seed=seed))


def put(device: OverMesh, mesh: MeshConfig) -> OverMesh:
    """With the model's weights."""
    params, bias = model()
    ready = preparing(CFG, mesh)(jax.device_put(params, parameter_shardings(CFG, mesh)))
    device.weights = Weights(ready, bias, CFG.vocab_size)
    return device


def engine(
    name: str,
    drafts: bool | str = False,
    pages: int = 4,
    redundant: int | None = None,
    fp8: bool = False,
    overlap: int | None = None,
) -> Engine:
    """Of so few pages that two sequences do not always fit. drafts: as of `Options`. redundant: experts, which move. overlap: as
    of `Sizes`."""
    mesh, sizes = MESHES[name], dataclasses.replace(SIZES, overlap=overlap)
    cfg, asked = decoding_config(CFG), bool(drafts)
    device = put(OverMesh(cfg, sizes, pages, fp8, asked, mesh=mesh, redundant=redundant), mesh)
    if drafts is True:  # always: what a warm-up would have measured matters to nothing
        decoding = {(kind, SIZES.slots): 0.01 for kind in ("decode", "drafts")}
        device.pace = Pace(decoding | {("prefill", *size): 0.01 for size in SIZES.chunks})
    return Engine(device, dataclasses.replace(OPTIONS, drafts=drafts))


def trace(seed: int, n: int) -> list[Request]:
    """Prompts of all lengths, some of which begin alike."""
    rng = np.random.default_rng(seed)
    begin = rng.integers(0, CFG.vocab_size, 160).tolist()
    prompts = []
    for _ in range(n):
        kept = int(rng.choice([0, 0, 64, 70, 130]))
        prompts.append(begin[:kept] + rng.integers(0, CFG.vocab_size, rng.integers(1, 100)).tolist())
    new = rng.integers(1, 40, n)
    room = [SIZES.max_model_len - len(p) for p in prompts]
    pairs = zip(prompts, np.minimum(new, room), strict=True)
    return [Request(str(i), p, int(m)) for i, (p, m) in enumerate(pairs)]


def tight() -> list[Request]:
    """Two on each device, whose third pages do not fit beside each other; then some that find a page, and short ones."""
    rng = np.random.default_rng(1)
    begin = rng.integers(0, CFG.vocab_size, 64).tolist()
    more = [58 + i % 6 for i in range(16)] + [5, 20]
    prompts = [begin + rng.integers(0, CFG.vocab_size, n).tolist() for n in more]
    prompts += [rng.integers(0, CFG.vocab_size, n).tolist() for n in (3, 16, 40)]
    return [Request(str(i), prompt, 8) for i, prompt in enumerate(prompts)]


def run(made: Engine, requests: list[Request], seed: int = 0) -> dict[str, list[int]]:
    """Ids of requests that come while others run."""
    found = tokens(made, requests, seed)
    return {name: [token.id for token in row] for name, row in found.items()}


def tokens(made: Engine, requests: list[Request], seed: int = 0) -> dict[str, list[Token]]:
    rng = np.random.default_rng(seed)
    left: list[Request] = list(requests)
    out: dict[str, list[Token]] = {request.id: [] for request in requests}
    while left or made.has_work:
        for _ in range(rng.integers(0, 6)):
            if left:
                made.submit(left.pop(0))
        for update in made.step():
            out[update.id] += update.tokens
    return out


def alone(requests: list[Request]) -> dict[str, list[int]]:
    """Each by itself, by the whole forward pass."""
    prompts, new = [request.prompt for request in requests], [request.max_tokens for request in requests]
    rows = greedy(model()[0], CFG, model()[1], prompts, new)
    return {request.id: row for request, row in zip(requests, rows, strict=True)}
