"""Reads in the schedule of a compiled program which collectives run while matrices are multiplied.

XLA prints the optimised program in the order in which it will be issued. An asynchronous collective is a pair of
instructions, start and done; what lies between them is issued while the data travel. A pair without work between is
marked `is_sync`. This shows what is possible on the device, not how long anything takes.
"""

import dataclasses
import re
from collections.abc import Iterator

COLLECTIVES = (
    "ragged-all-to-all",
    "all-to-all",
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "collective-permute",
)

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (?:\(.*?\)|\S+) ([\w\-]+)\(")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_KERNEL = re.compile(r"jit\((\w+)\)/body")
_OPERAND = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    text: str

    @property
    def op_name(self) -> str:
        """Says where in the Python program it comes from: scopes, separated by /."""
        match = _OP_NAME.search(self.text)
        return match[1] if match else ""

    @property
    def is_gemm(self) -> bool:
        """Says whether it multiplies matrices: in a fusion of XLA, by cuBLAS or by a kernel named after it. In a layer
        of stacked weights, the latter two are fused with the slice."""
        sliced = self.opcode == "fusion" and self.name.startswith("dynamic_slice_fusion")
        if sliced or self.opcode == "custom-call":
            if self.kernel:
                return re.search("gemm|wgrad", self.kernel) is not None
            return "__cublas" in self.text or (sliced and "/dot_general" in self.op_name)
        return self.opcode == "dot" or (self.opcode == "fusion" and "gemm_fusion" in self.name)

    @property
    def kernel(self) -> str:
        """The name of the kernel of ours that it runs, or ""."""
        match = _KERNEL.search(self.op_name)
        return match[1] if match and self.opcode in ("custom-call", "fusion") else ""

    def reads(self, name: str) -> bool:
        operands = self.text.split(f" {self.opcode}(", 1)[1].split("), ", 1)[0]
        return name in _OPERAND.findall(operands)


@dataclasses.dataclass(frozen=True)
class Transfer:
    """One collective. `gemms` are the GEMMs issued between its start and its done, by their scopes; `attention` the kernels of
    an attention's core likewise; text: its line."""

    name: str
    opcode: str
    op_name: str
    computation: str
    is_sync: bool
    gemms: tuple[str, ...]
    attention: tuple[str, ...] = ()
    text: str = ""

    @property
    def hidden(self) -> bool:
        """Says whether it is asynchronous around at least one GEMM."""
        return not self.is_sync and bool(self.gemms)

    @property
    def backward(self) -> bool:
        return "transpose(" in self.op_name

    def within(self, *scopes: str) -> str:
        """Returns the innermost of `scopes` that it lies in, or ""."""
        return next((part for part in reversed(self.op_name.split("/")) if part in scopes), "")


def computations(program: str) -> Iterator[tuple[str, list[Instruction]]]:
    """Yields name and instructions, in order, of each computation of an HLO text."""
    name = ""
    body: list[Instruction] = []
    for line in program.splitlines():
        if match := _COMPUTATION.match(line):
            name, body = match[1], []
        elif match := _INSTRUCTION.match(line):
            body.append(Instruction(match[1], match[2], line))
        elif line.startswith("}") and name:
            yield name, body
            name = ""


def _origin(body: list[Instruction], start: Instruction, done: Instruction) -> str:
    """Returns the op_name of a collective: its own or, where XLA keeps none, that of what reads its result."""
    readers = (x for x in body if x.reads(done.name))
    return next((x.op_name for x in (start, done, *readers) if x.op_name), "")


def _transfer(computation: str, body: list[Instruction], at: int, opcode: str) -> Transfer:
    start = body[at]
    if start.opcode == opcode:
        return Transfer(
            start.name, opcode, _origin(body, start, start), computation, True, (), (), start.text
        )
    end = next(
        i
        for i in range(at + 1, len(body))
        if body[i].opcode == f"{opcode}-done" and body[i].reads(start.name)
    )
    return Transfer(
        name=start.name,
        opcode=opcode,
        op_name=_origin(body, start, body[end]),
        computation=computation,
        is_sync='"is_sync":true' in start.text,
        gemms=tuple(x.op_name for x in body[at + 1 : end] if x.is_gemm),
        attention=tuple(x.op_name for x in body[at + 1 : end] if x.kernel.startswith("mla_")),
        text=start.text,
    )


def transfers(program: str) -> list[Transfer]:
    """Lists the collectives of a scheduled HLO text (`compiled.as_text()`), in the order of the text."""
    found = []
    for name, body in computations(program):
        for at, instruction in enumerate(body):
            opcode = instruction.opcode.removesuffix("-start")
            if opcode in COLLECTIVES:
                found.append(_transfer(name, body, at, opcode))
    return found
