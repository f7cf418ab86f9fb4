"""A zText module written here, read back; and markup turned into plain lines."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import pytest

from recipes.sword import ModuleError, entries, plain


def write_module(folder: Path, testaments: dict[str, list[list[str]]]) -> None:
    """testaments: name -> books -> verses."""
    for name, books in testaments.items():
        packed, places, verses = b"", b"", b""
        for number, book in enumerate(books):
            content = "".join(book).encode()
            stream, start = zlib.compress(content), 0
            places += struct.pack("<III", len(packed), len(stream), len(content))
            packed += stream
            for verse in book:
                size = len(verse.encode())
                verses += struct.pack("<IIH", number, start, size)
                start += size
        for kind, content in (("z", packed), ("s", places), ("v", verses)):
            (folder / f"{name}.bz{kind}").write_bytes(content)


def test_entries_come_in_order(tmp_path):
    write_module(tmp_path, {"ot": [["a b", "", "“ç”"], ["d"]], "nt": [["e"]]})
    assert list(entries(tmp_path)) == ["a b", "", "“ç”", "d", "e"]


@pytest.mark.parametrize("kind", ["z", "s", "v"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_damaged_modules_are_named(tmp_path, kind, damage):
    write_module(tmp_path, {"ot": [["a b", "c"]], "nt": [["e"]]})
    path = tmp_path / f"nt.bz{kind}"
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ModuleError, match=rf"nt\.bz\* can't be read.*delete {tmp_path}"):
        list(entries(tmp_path))


@pytest.mark.parametrize(
    ("entry", "line"),
    [
        ('<w lemma="x">In</w> <w>the</w> <w>beginning</w>, <w>God</w>', "In the beginning, God"),
        ('<w>God</w><note place="foot"><reference>1:1 </reference>see below</note><w>created</w>', "God created"),
        ("<w>tree</w><note>or book</note>, he said", "tree, he said"),
        ('<l level="1" sID="l1"/><w>Woe</w>!<l eID="l1"/> <l sID="l2"/>“<w>Truly</w>', "Woe! “Truly"),
        ('<title type="main"/><title level="1">Genesis</title> text', "text"),
        ('Amen. <div sID="d" type="glossary"/> <title>Glossary</title> Abba is a word.', "Amen."),
        ("bread &amp; wine <di", "bread & wine"),
        ('<chapter osisID="Gen.1" sID="Gen.1"/>', ""),
    ],
)
def test_plain_line(entry, line):
    assert plain(entry) == line
