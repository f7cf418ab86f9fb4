"""The wheel runs by itself, without the packages of recipes and tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import zoo
from tests.report.logs import history, write_run
from tests.test_pipelines import tokenizer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
LACKING = ("datasets", "evaluate", "gguf", "matplotlib", "peft", "PIL", "sacrebleu", "sklearn", "tensorboard")
SITE = f"""
from importlib.machinery import PathFinder

stock = PathFinder.find_spec
PathFinder.find_spec = staticmethod(
    lambda name, *more: None if name.partition(".")[0] in {LACKING} else stock(name, *more)
)
"""
Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel of this checkout holds."""
    source, wheels, installed = (tmp_path_factory.mktemp(name) for name in ("source", "wheels", "installed"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("hf_layerpar", "recipes", "tests"):  # only one of them belongs into it
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    pip = [sys.executable, "-m", "pip", "-q"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", wheels, source], check=True)
    (wheel,) = wheels.iterdir()
    subprocess.run([*pip, "install", "--no-deps", "--target", installed, wheel], check=True)
    (installed / "sitecustomize.py").write_text(SITE)
    return installed


@pytest.fixture
def run(installed: Path, tmp_path: Path) -> Command:
    """Python with the wheel, in an empty folder."""

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    return run


def test_what_it_holds(installed: Path, run: Command) -> None:
    names = {path.name.partition("-")[0] for path in installed.iterdir()} - {"sitecustomize.py", "__pycache__"}
    assert names == {"hf_layerpar", "bin"}
    held = {p.relative_to(ROOT) for p in (ROOT / "hf_layerpar").rglob("*") if p.suffix in (".py", ".typed", ".md")}
    assert held - {p.relative_to(installed) for p in installed.rglob("*")} == {Path("hf_layerpar/README.md")}
    said = run(
        "-c",
        "import hf_layerpar, importlib.util as u\n"
        "for name in hf_layerpar.__all__: getattr(hf_layerpar, name)\n"
        f"print(hf_layerpar.__file__, [name for name in {LACKING} if u.find_spec(name)])",
    )
    assert said.stdout.split() == [str(installed / "hf_layerpar" / "__init__.py"), "[]"], said.stderr


def test_its_commands(installed: Path, run: Command, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    zoo.build("llama")[0].save_pretrained(source)
    tokenizer().save_pretrained(source)
    small = ["--random", "--batches", 1, "--batch-size", 2, "--tokens", 8, "--coarsening", 2]
    for expected, *command in (
        ("check", "--help"),
        ("predicted share of serial", "plan", "--layers", 16, "--ranks", 4),
        ("step size 0.5 (split form)", "convert", source, target, "--step-size", 0.5),
        ("pipeline", "check", target, *small, "--json", tmp_path / "check.json"),
        ("share", "plan", "--layers", 16, "--ranks", 4, "--costs", tmp_path / "check.json"),
        ("mgrit", "report", write_run(tmp_path / "run", history())),
    ):
        done = run(installed / "bin" / "hf-layerpar", *command)
        assert (done.returncode, expected in done.stdout) == (0, True), f"{command}: {done.stdout}{done.stderr}"


def test_what_is_missing_for_a_picture_is_said_first(installed: Path, run: Command, tmp_path: Path) -> None:
    write_run(tmp_path / "run", history())
    for command in (("plan", "--layers", 16, "--ranks", 4), ("report", "run"), ("check", "nothing", "--random")):
        done = run(installed / "bin" / "hf-layerpar", *command, "--png", "x.png")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == (
            "hf-layerpar: drawing needs matplotlib, which is not installed; pip install 'hf_layerpar[report]'\n"
        )
