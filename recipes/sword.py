"""Reads the texts of SWORD modules (CrossWire's zText format, OSIS markup) with the standard library alone.

A module holds two testaments of three files each. `<t>.bzz` is a row of zlib streams, one a book. `<t>.bzs` has a
record of three little-endian uint32 a book: place and size of its stream, size unpacked. `<t>.bzv` has a record a
verse, in the order of the module's versification (headings have places too): uint32 book, uint32 start and uint16 size
in the unpacked book. Debian packages them as sword-text-*.
"""

from __future__ import annotations

import html
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from hf_layerpar.errors import LayerParallelError

TESTAMENTS = ("ot", "nt")

_NOT_TEXT = re.compile(r"<(note|title)\b[^>]*(?<!/)>.*?</\1>", re.DOTALL)
_TAG = re.compile(r"<[^>]*(?:>|$)")  # sizes of 16 bits cut very long entries off, maybe inside a tag
_INLINE = re.compile(r"</?(?:w|q|seg|name|rdg|catchWord|reference)\b[^>]*>")
_CHAPTER = re.compile(r'<chapter\b[^>]*\bosisID="([^"]+)"')
_GLOSSARY = re.compile(r'<div\b[^>]*type="glossary".*', re.DOTALL)


class ModuleError(LayerParallelError, RuntimeError):
    """The files of a module don't fit together."""


def entries(folder: Path) -> Iterator[str]:
    """The marked-up text of every place of both testaments in order, "" for a place without text.

    Raises ModuleError where a file is cut short or is no zText.
    """
    for testament in TESTAMENTS:
        path = folder / testament
        try:
            packed = path.with_suffix(".bzz").read_bytes()
            records = struct.iter_unpack("<III", path.with_suffix(".bzs").read_bytes())
            books = [zlib.decompress(packed[start : start + size]) for start, size, _ in records]
            for book, start, size in struct.iter_unpack("<IIH", path.with_suffix(".bzv").read_bytes()):
                yield books[book][start : start + size].decode() if size else ""
        except (OSError, struct.error, zlib.error, IndexError, UnicodeDecodeError) as error:
            raise ModuleError(f"{path}.bz* can't be read as a zText module: {error}; delete {folder}") from error


def chapters(folder: Path) -> dict[str, list[str]]:
    """The plain text of every verse place of every chapter by its name ("Gen.1"), in the module's order.

    Modules differ in the places around the chapters (headings, books that one of them lacks), not in these names.
    """
    found: dict[str, list[str]] = {}
    verses: list[str] = []  # what precedes the first chapter belongs to none
    for entry in entries(folder):
        heading = _CHAPTER.search(entry)
        if heading:
            verses = found.setdefault(heading[1], [])
        else:
            verses.append(plain(entry))
    return found


def plain(entry: str) -> str:
    """The words of an entry in one line, without markup, notes, titles and the glossary after the last verse."""
    entry = _NOT_TEXT.sub(" ", _GLOSSARY.sub("", entry))
    entry = _TAG.sub(" ", _INLINE.sub("", entry))
    entry = " ".join(html.unescape(entry).split())
    return re.sub(r" (?=[,.;:?!’”])", "", entry)  # a note between a word and its comma leaves a gap
