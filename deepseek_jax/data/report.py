"""A `CorpusReport` counts what was read of a corpus, and names what was skipped and why."""

import dataclasses
from typing import Any, NamedTuple

EXAMPLES_PER_KIND = 4


class Document(NamedTuple):
    """One text with the name it is reported under: a path, or `path:line` / `path:row`."""

    name: str
    text: str


@dataclasses.dataclass
class CorpusReport:
    """Counts of what was read and skipped.

    Attributes:
        files: files opened.
        documents: documents kept.
        num_bytes: UTF-8 bytes of the documents kept.
        skipped: number of skipped files, lines or rows by kind of fault.
        examples: the first few faults of each kind as (name, reason).
    """

    files: int = 0
    documents: int = 0
    num_bytes: int = 0
    skipped: dict[str, int] = dataclasses.field(default_factory=dict)
    examples: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    @property
    def num_skipped(self) -> int:
        return sum(self.skipped.values())

    def keep(self, document: Document) -> None:
        self.documents += 1
        self.num_bytes += len(document.text.encode())

    def skip(self, name: str, kind: str, detail: str = "", count: int = 1) -> None:
        """Counts faults of `kind` (a short fixed phrase) and remembers the first few in full."""
        self.skipped[kind] = self.skipped.get(kind, 0) + count
        if sum(_is_of(kind, reason) for _, reason in self.examples) < EXAMPLES_PER_KIND:
            self.examples.append((_printable(name), f"{kind}: {_printable(detail)}" if detail else kind))

    def add(self, other: "CorpusReport") -> None:
        """Adds the counts of `other`."""
        self.files, self.documents = self.files + other.files, self.documents + other.documents
        self.num_bytes += other.num_bytes
        for kind, count in other.skipped.items():
            self.skipped[kind] = self.skipped.get(kind, 0) + count
        self.examples += other.examples

    def summary(self) -> str:
        """One line for a log, plus one line for each kind of fault, which counts and names."""
        head = f"{self.documents} documents, {self.num_bytes / 1e6:.2f} MB from {self.files} files"
        if not self.skipped:
            return head
        lines = [self._line(kind, count) for kind, count in sorted(self.skipped.items())]
        return "\n".join([f"{head}; skipped {self.num_skipped}:", *lines])

    def reasons(self) -> str:
        """The remembered faults in one line, to end an error with; "" without any."""
        faults = "; ".join(f"{name}: {reason}" for name, reason in self.examples)
        return f": {faults}" if faults else ""

    def _line(self, kind: str, count: int) -> str:
        named = [
            f"{name}{f' ({detail})' if (detail := reason[len(kind) + 2 :]) else ''}"
            for name, reason in self.examples
            if _is_of(kind, reason)
        ]
        return f"  {count} {kind}: {', '.join(named)}{', ...' if count > len(named) else ''}"

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "CorpusReport":
        return cls(**{**values, "examples": [tuple(example) for example in values["examples"]]})


def _is_of(kind: str, reason: str) -> bool:
    return reason == kind or reason.startswith(f"{kind}: ")


def _printable(text: str) -> str:
    """`text` on one line that any terminal and file takes: names and keys may hold anything, lone surrogates too."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
