"""Files are unpacked in bounded pieces: chunks of bytes, lines, and parts of a long text."""

import gzip
from collections.abc import Iterator
from pathlib import Path

import zstandard

CHUNK_BYTES = 1 << 20
MAX_DOCUMENT_BYTES = 1 << 24
PART_BYTES = (
    1 << 20
)  # a longer text is cut into parts of this size, so that they split evenly into training and validation
_ZSTD_BYTES = 512  # read at once: so much can unpack to 16 MiB, a block of 128 KiB from every 4 bytes


def lines(data: Iterator[bytes]) -> Iterator[bytes | None]:
    """Whole lines; None for one beyond the limit. When `data` raises, the unfinished line is dropped with it."""
    rest, too_long = bytearray(), False
    for chunk in data:
        *ends, tail = chunk.split(b"\n")
        for line in ends:
            too_long |= len(rest) + len(line) > MAX_DOCUMENT_BYTES
            yield None if too_long else bytes(rest) + line
            rest, too_long = bytearray(), False
        too_long |= len(rest) + len(tail) > MAX_DOCUMENT_BYTES
        if too_long:
            rest = bytearray()
        else:
            rest += tail
    if rest or too_long:
        yield None if too_long else bytes(rest)


def parts(data: Iterator[bytes]) -> Iterator[bytes]:
    """Yields the bytes whole, or, beyond the limit, in parts that end with a line break, or else a character."""
    rest, is_long = bytearray(), False
    for chunk in data:
        rest += chunk
        is_long |= len(rest) > MAX_DOCUMENT_BYTES
        while is_long and len(rest) > PART_BYTES:
            cut = rest.rfind(b"\n", 0, PART_BYTES) + 1 or _between_characters(rest)
            yield bytes(rest[:cut])
            del rest[:cut]
    if rest or not is_long:
        yield bytes(rest)


def _between_characters(data: bytearray) -> int:
    """The last place up to the length of a part before which no UTF-8 character is torn apart."""
    back = range(PART_BYTES, PART_BYTES - 4, -1)
    return next((place for place in back if data[place] & 0xC0 != 0x80), PART_BYTES)


def chunks(path: str) -> Iterator[bytes]:
    """The (decompressed) bytes of a file, a bounded number at a time; an archive that ends early raises EOFError."""
    if path.lower().endswith(".zst"):
        yield from _zstd_chunks(path)
        return
    with gzip.open(path) if path.lower().endswith(".gz") else Path(path).open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def _zstd_chunks(path: str) -> Iterator[bytes]:
    # zstandard's own stream reader takes a truncated frame for a normal end, so frames are followed here.
    unpack = zstandard.ZstdDecompressor(max_window_size=1 << 31)  # zstd --long=31
    decompressor, in_frame = unpack.decompressobj(), False
    with Path(path).open("rb", buffering=CHUNK_BYTES) as file:
        while block := file.read(_ZSTD_BYTES):
            while block:
                chunk = decompressor.decompress(block)
                block, in_frame = decompressor.unused_data, not decompressor.eof
                if decompressor.eof:
                    decompressor = unpack.decompressobj()
                yield chunk
    if in_frame:
        raise EOFError("the zstd frame ends before its end marker")
