"""Compile a kernel for an H100 on a machine without a GPU, and read what the compiler says about it.

Needs `jax-cuda13-plugin` and `jax-cuda13-pjrt` of the jaxlib version (install with `--no-deps`: no CUDA library is
loaded) and `ptxas` from a CUDA toolkit or from the wheel `nvidia-cuda-nvcc`. Mosaic GPU reads its dump folder once per
process, so every compilation runs in a process of its own:

    report = compile_for_h100("pallas_kernels.testing.cases:fp8_gemm", {"m": 4096, "n": 4096, "k": 7168})

`h100.txtpb` describes the device to XLA; on a machine with the GPU it can be regenerated from
`jax._src.lib.xla_client.get_topology_for_devices(jax.devices()).target_config`.
"""

import dataclasses
import importlib
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

TARGET = pathlib.Path(__file__).with_name("h100.txtpb")
TIMEOUT_S = 240
REGISTERS_PER_SM = 65536
SHARED_BYTES_PER_SM = 233472
SHARED_BYTES_RESERVED = 1024  # per thread block, by the driver
THREADS_PER_SM = 2048


@dataclasses.dataclass(frozen=True)
class KernelReport:
    """What ptxas and Mosaic say about one kernel compiled for sm_90a."""

    name: str
    registers: int  # per thread
    spill_bytes: int  # spill stores and loads together
    serialised: bool  # ptxas gave up overlapping wgmma
    shared_bytes: int  # dynamic shared memory per thread block
    threads: int  # per thread block
    wgmma: tuple[str, ...]  # the kinds of wgmma in the PTX
    tma: bool  # bulk tensor copies in the PTX

    @property
    def blocks_per_sm(self) -> int:
        """Predicted occupancy: thread blocks that fit on one SM by registers, shared memory and threads."""
        by_registers = REGISTERS_PER_SM // max(1, self.registers * self.threads)
        by_shared = SHARED_BYTES_PER_SM // (self.shared_bytes + SHARED_BYTES_RESERVED)
        return min(by_registers, by_shared, THREADS_PER_SM // self.threads)

    @property
    def clean(self) -> bool:
        return self.spill_bytes == 0 and not self.serialised


class CompileError(RuntimeError):
    """The kernel did not compile for H100; the message ends with the compiler's."""


def why_unavailable() -> str | None:
    """Why this machine cannot compile for H100, or None if it can."""
    if importlib.util.find_spec("jax_plugins") is None or not _has_plugin():
        return "the packages jax-cuda13-plugin and jax-cuda13-pjrt are not installed"
    if shutil.which("ptxas") is None and not pathlib.Path("/usr/local/cuda/bin/ptxas").exists():
        has_wheel = importlib.util.find_spec("nvidia") is not None
        if not has_wheel:
            return "no ptxas: neither a CUDA toolkit nor the package nvidia-cuda-nvcc is installed"
    return None


def _has_plugin() -> bool:
    return any(importlib.util.find_spec(f"jax_plugins.{name}") for name in ("xla_cuda13", "xla_cuda12"))


def compile_for_h100(case: str, arguments: dict) -> list[KernelReport]:
    """Compile `case` for one H100 in a subprocess.

    Args:
      case: "module:function"; the function takes `arguments` and returns (callable, list of ShapeDtypeStruct).
      arguments: JSON values.

    Returns:
      One report per Mosaic GPU kernel in the program, in order of compilation.

    Raises:
      CompileError: lowering or compiling failed, or ran over four minutes.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
            "MOSAIC_GPU_DUMP_TO": folder,
            "MOSAIC_GPU_DUMP_PTX": "1",
            "MOSAIC_GPU_DUMP_PTXAS": "1",
        }
        command = [sys.executable, "-m", __name__, case, json.dumps(arguments)]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            raise CompileError(f"{case} {arguments}: compiling took over {TIMEOUT_S} s") from error
        if done.returncode != 0:
            raise CompileError(f"{case} {arguments}: exit code {done.returncode}\n{done.stderr[-3000:]}")
        return read_dump(pathlib.Path(folder))


def read_dump(folder: pathlib.Path) -> list[KernelReport]:
    """Parse the `.ptx` and `.ptxas` files that Mosaic GPU dumped."""
    reports = []
    for path in sorted(folder.glob("*.ptxas")):
        log = path.read_text()
        ptx = path.with_suffix(".ptx").read_text()
        registers = max(int(n) for n in re.findall(r"Used (\d+) registers", log))
        spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log))
        threads = re.search(r"\.(?:reqntid|maxntid) (\d+), (\d+), (\d+)", ptx)
        reports.append(
            KernelReport(
                name=path.stem,
                registers=registers,
                spill_bytes=spills,
                serialised="serialized" in log,
                shared_bytes=_shared_bytes(folder, path.stem),
                threads=math.prod(int(n) for n in threads.groups()) if threads else 0,
                wgmma=tuple(sorted(set(re.findall(r"wgmma\.mma_async[\w.]*?\.(m64n\d+k\d+[\w.]*)", ptx)))),
                tma="cp.async.bulk.tensor" in ptx,
            )
        )
    return reports


def _shared_bytes(folder: pathlib.Path, stem: str) -> int:
    program = (folder / f"{stem}.before_layout_inference.txt").read_text()
    found = re.search(r"dynamic_shared_memory_size %c(\d+)", program)
    return int(found.group(1)) if found else 0


def _compile(case: str, arguments: dict) -> None:
    """In the subprocess: lower and compile for the H100 of `h100.txtpb`."""
    import jax
    from jax.experimental import topologies
    from jax.sharding import NamedSharding, PartitionSpec, use_abstract_mesh

    topology = topologies.get_topology_desc(
        platform="cuda", target_config=TARGET.read_text(), topology="1x1x1"
    )
    mesh = topologies.make_mesh(topo=topology, mesh_shape=(1,), axis_names=("device",))
    replicated = NamedSharding(mesh, PartitionSpec())
    module, function = case.split(":")
    fn, shapes = getattr(importlib.import_module(module), function)(**arguments)
    operands = [jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=replicated) for s in shapes]
    with use_abstract_mesh(mesh.abstract_mesh):
        jax.jit(fn).lower(*operands).compile()


if __name__ == "__main__":
    _compile(sys.argv[1], json.loads(sys.argv[2]))
