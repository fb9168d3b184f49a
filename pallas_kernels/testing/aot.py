"""Compiles a kernel for an H100 on a machine without a GPU, and reads what the compiler says about it.

Needs `jax-cuda13-plugin` and `jax-cuda13-pjrt` of the jaxlib version (install with `--no-deps`: no CUDA library is
loaded) and `ptxas` from a CUDA toolkit or from the wheel `nvidia-cuda-nvcc`. Mosaic GPU reads its dump folder once per
process, so compilations run in a subprocess:

    [report] = compile_for_h100([workload("fp8_gemm", GemmShape("example", 4096, 4096, 7168))])

`h100.txtpb` describes the device to XLA; on a machine with the GPU it can be regenerated from
`jax._src.lib.xla_client.get_topology_for_devices(jax.devices()).target_config`.
"""

import dataclasses
import importlib.util
import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pallas_kernels.testing.workloads import Workload

TARGET = pathlib.Path(__file__).with_name("h100.txtpb")
ROOT = pathlib.Path(__file__).parents[2]
DUMP_TO = "MOSAIC_GPU_DUMP_TO"  # names Mosaic GPU's folder; read once per process
START_S, CASE_S = 60, 60  # time allowed to the subprocess, and to each case on a slow machine
REGISTERS_PER_SM = 65536
SHARED_BYTES_PER_SM = 233472
SHARED_BYTES_RESERVED = 1024  # per thread block, by the driver
THREADS_PER_SM = 2048


@dataclasses.dataclass(frozen=True)
class KernelReport:
    """What ptxas and Mosaic say about one kernel compiled for sm_90a."""

    registers: int  # per thread
    spill_bytes: int  # spill stores and loads together
    serialised: bool  # ptxas gave up overlapping wgmma
    shared_bytes: int  # dynamic shared memory per thread block
    threads: int  # per thread block
    wgmma: tuple[str, ...]  # the kinds of wgmma in the PTX
    tma: bool  # bulk tensor copies in the PTX
    multicast: bool = False  # some of them for all thread blocks of a cluster

    @property
    def blocks_per_sm(self) -> int:
        """Predicts how many thread blocks fit on one SM by registers, shared memory and threads."""
        by_registers = REGISTERS_PER_SM // max(1, self.registers * self.threads)
        by_shared = SHARED_BYTES_PER_SM // (self.shared_bytes + SHARED_BYTES_RESERVED)
        return min(by_registers, by_shared, THREADS_PER_SM // self.threads)

    @property
    def clean(self) -> bool:
        return self.spill_bytes == 0 and not self.serialised


@dataclasses.dataclass(frozen=True)
class CaseReport:
    """One compiled program: its Mosaic GPU kernels, or the compiler's message."""

    kernels: tuple[KernelReport, ...]
    error: str | None


def merged(kernels: Sequence[KernelReport]) -> KernelReport | None:
    """Returns the worst of what is said about an op's kernels, or None of none."""
    if not kernels:
        return None
    worst = {
        field: max(getattr(k, field) for k in kernels) for field in ("registers", "spill_bytes", "threads")
    }
    return KernelReport(
        **worst,
        serialised=any(k.serialised for k in kernels),
        shared_bytes=max(k.shared_bytes for k in kernels),
        wgmma=tuple(sorted({kind for k in kernels for kind in k.wgmma})),
        tma=any(k.tma for k in kernels),
    )


def mosaic_dump(folder: str) -> dict[str, str]:
    """Returns the environment in which a process leaves in `folder` what `read_dump` reads."""
    return {DUMP_TO: folder, "MOSAIC_GPU_DUMP_PTX": "1", "MOSAIC_GPU_DUMP_PTXAS": "1"}


def why_unavailable() -> str | None:
    """Says why this machine cannot compile for H100, or None if it can."""
    plugins = [f"jax_plugins.{name}" for name in ("xla_cuda13", "xla_cuda12")]
    if importlib.util.find_spec("jax_plugins") is None or not any(map(importlib.util.find_spec, plugins)):
        return "the packages jax-cuda13-plugin and jax-cuda13-pjrt are not installed"
    in_path = shutil.which("ptxas") or pathlib.Path("/usr/local/cuda/bin/ptxas").exists()
    if not in_path and importlib.util.find_spec("nvidia") is None:
        return "no ptxas: neither a CUDA toolkit nor the package nvidia-cuda-nvcc is installed"
    return None


def compile_for_h100(workloads: Sequence["Workload"]) -> list[CaseReport]:
    """Compiles the kernels of workloads for one H100, all in one subprocess.

    Args:
      workloads: no two may hold the same kernel, which would be compiled only once.

    Returns:
      One report per workload, in order. A case that does not compile has `error` set and does not stop the others.

    Raises:
      RuntimeError: the subprocess itself died or ran over its time.
    """
    with tempfile.TemporaryDirectory() as folder:
        here = {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
        environment = os.environ | here | mosaic_dump(folder)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        cases = [(w.op, dataclasses.asdict(w.shape), w.options) for w in workloads]
        command = [sys.executable, "-m", "pallas_kernels.testing.aot", json.dumps(cases)]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=START_S + CASE_S * len(cases)
        )
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode != 0 or len(lines) != len(cases):
            raise RuntimeError(
                f"compiling for H100 died with exit code {done.returncode}\n{done.stderr[-3000:]}"
            )
        return [CaseReport(read_dump(pathlib.Path(folder), line["kernels"]), line["error"]) for line in lines]


def read_dump(folder: pathlib.Path, stems: list[str]) -> tuple[KernelReport, ...]:
    """Parses what Mosaic GPU dumped for the kernels named."""
    reports = []
    for stem in stems:
        log = (folder / f"{stem}.ptxas").read_text()
        ptx = (folder / f"{stem}.ptx").read_text()
        program = (folder / f"{stem}.before_layout_inference.txt").read_text()
        threads = re.search(r"\.(?:reqntid|maxntid) (\d+), (\d+), (\d+)", ptx)
        shared = re.search(r"dynamic_shared_memory_size %c(\d+)", program)
        if threads is None or shared is None:
            raise RuntimeError(f"{stem}: no thread count or no shared memory size in the compiler's dump")
        reports.append(
            KernelReport(
                registers=max(int(n) for n in re.findall(r"Used (\d+) registers", log)),
                spill_bytes=sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log)),
                serialised="serialized" in log,
                shared_bytes=int(shared.group(1)),
                threads=math.prod(int(n) for n in threads.groups()),
                wgmma=tuple(sorted(set(re.findall(r"wgmma\.mma_async[\w.]*?\.(m64n\d+k\d+[\w.]*)", ptx)))),
                tma="cp.async.bulk.tensor" in ptx,
                multicast="multicast::cluster" in ptx,
            )
        )
    return tuple(reports)


def _compile_all(cases: list[tuple[str, dict, dict]]) -> None:
    """Compiles each case, in the subprocess, for the H100 of `h100.txtpb`; prints one JSON line per case."""
    import jax
    from jax.experimental import topologies
    from jax.sharding import NamedSharding, PartitionSpec, use_abstract_mesh

    from pallas_kernels.testing.workloads import workload

    topology = topologies.get_topology_desc(
        platform="cuda", target_config=TARGET.read_text(), topology="1x1x1"
    )
    mesh = topologies.make_mesh(topo=topology, mesh_shape=(1,), axis_names=("device",))
    replicated = NamedSharding(mesh, PartitionSpec())
    folder = pathlib.Path(os.environ[DUMP_TO])
    seen: set[str] = set()
    for op, shape, options in cases:
        error = None
        try:
            fn, shapes = workload(op, shape, **options).program()
            operands = jax.tree.map(
                lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=replicated), shapes
            )
            with use_abstract_mesh(mesh.abstract_mesh):
                jax.jit(fn).lower(*operands).compile()
        except Exception as failure:  # whatever the compiler raises is this case's result
            error = f"{type(failure).__name__}: {failure}"
        new = {path.stem for path in folder.glob("*.ptxas")} - seen
        seen |= new
        print(json.dumps({"kernels": sorted(new), "error": error}), flush=True)


if __name__ == "__main__":
    _compile_all(json.loads(sys.argv[1]))
