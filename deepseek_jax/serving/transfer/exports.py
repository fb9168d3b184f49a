"""What the engine of a prefill server does beside computing: pages that a chunk made whole leave the device."""

from collections.abc import Iterable
from typing import Any

from deepseek_jax.model.cache import PAGE
from deepseek_jax.serving.steps import Chunk


def export_pages(device: Any, rank: int, chunks: Iterable[Chunk]) -> None:
    """Of each prompt that is computed for another server: the pages that it has whole after its chunk, which was launched, as
    copies that are on their way to the host.

    A copy is a program of its own, behind that of the chunk and before that of the next: it waits for the one, and the other
    for nothing but it. Pages that were found in the prefix cache go with the first chunk. What the copy holds does not depend
    on whose the pages are afterwards.
    """
    for chunk in chunks:
        export = chunk.running.request.export
        if export is None:
            continue
        computed = chunk.start + len(chunk.tokens)
        whole = -(-computed // PAGE) if computed == export.end else computed // PAGE
        while export.sent < whole:
            some = chunk.running.pages[export.sent : whole][: device.sizes.moved]
            block = device.export(rank, some)
            block.copy_to_host_async()
            export.take(export.sent, len(some), block)
            export.sent += len(some)
