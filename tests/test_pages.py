"""Every snippet of the pages runs, in a folder that has stand-ins for the models, texts and runs that pages take as
given. What it takes to be a command that is too long to run, its own parser accepts."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
import venv
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from accelerate.commands.launch import launch_command_parser

from hf_layerpar.cli import main as hf_layerpar
from hf_layerpar.ode.convert import convert_to_ode
from recipes import pretrain_bert, pretrain_gpt2, tag_morphology, train_vit, translate_marian
from recipes.benchmarks.launch import ROOT
from tests import zoo
from tests.hub.endpoint import Endpoint
from tests.multiproc import RankPool
from tests.report.logs import history, write_run
from tests.test_pipelines import tokenizer
from tests.training import runs

CARDS = sorted(f"model_cards/{path.name}" for path in (ROOT / "model_cards").glob("*.md"))
PAGES = ["README.md", "hf_layerpar/README.md", "recipes/README.md", "recipes/benchmarks/README.md", *CARDS]
RECIPES = ("glue_bert", "pretrain_bert", "pretrain_gpt2", "train_vit", "translate_marian", "tag_morphology")

_FENCED = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.M | re.S)
_INLINE = re.compile(r"`((?:\S*/)?(?:python3?|pip|pytest|hf|hf-layerpar|accelerate)\s[^`]+)`")
_TWO_RANKS = re.compile(r"lp_size=2|all lp ranks")
_PLACES = {"NAME.py": "glue_bert.py", "SETTINGS.yaml": "recipes/glue_bert_paper.yaml", "SYSTEM": "bert"}
"""What stands for the words in capitals of a command in the running text; others are stand-ins of that name."""


def fenced(page: str, *languages: str) -> list[tuple[int, str]]:
    """(line, text) of the page's blocks in these languages."""
    text = (ROOT / page).read_text("utf-8")
    return [(text.count("\n", 0, m.start()) + 2, m[3]) for m in _FENCED.finditer(text) if m[2] in languages]


def inline(page: str) -> list[tuple[int, list[str]]]:
    """(line, words) of the commands in the page's running text, without the brackets of what may be left out."""
    text = _FENCED.sub(lambda m: "\n" * m[0].count("\n"), (ROOT / page).read_text("utf-8"))
    found = []
    for match in _INLINE.finditer(text):
        command = re.sub(r"[][]|--OPTION|\.\.\.", "", match[1])
        for word, place in _PLACES.items():
            command = re.sub(rf"\b{re.escape(word)}(?=\s|$)", place, command)
        found.append((text.count("\n", 0, match.start()) + 1, shlex.split(command)))
    return found


def snippets(find: Callable[..., list[tuple[int, Any]]], *languages: str) -> list[Any]:
    return [
        pytest.param(page, line, what, id=f"{page}:{line}") for page in PAGES for line, what in find(page, *languages)
    ]


def test_no_block_is_left_out() -> None:
    for page in PAGES:
        text = (ROOT / page).read_text("utf-8")
        assert 2 * len(_FENCED.findall(text)) == len(re.findall("^ *```", text, re.M)), f"{page} has an odd fence"
        kinds = {match[2] for match in _FENCED.finditer(text)}
        assert kinds <= {"python", "bash", "sh"}, f"{page} has blocks in {kinds}, which nothing here runs"
    assert all(fenced(page, "python") for page in ("README.md", "recipes/README.md", *CARDS))
    assert {Path(card).stem for card in CARDS} == set(RECIPES)


# ---- what pages take as given
@pytest.fixture(scope="module")
def place(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like a checkout in which runs have been made, with a small checkpoint for each name that pages load."""
    place = tmp_path_factory.mktemp("place")
    for name in ("recipes", "constraints.txt", "pyproject.toml"):
        (place / name).symlink_to(ROOT / name)
    words = tokenizer()
    words.add_special_tokens({"cls_token": "<s>", "sep_token": "</s>"})
    classifier = convert_to_ode(runs.build("bert_classifier", layers=2))
    small = {"width": 16, "heads": 2, "inner_layers": 2}
    models = {
        "bert-base-uncased": zoo.build("bert")[0],
        "MODEL": zoo.build("llama", max_position_embeddings=128, hidden_size=16, intermediate_size=32)[0],
        "SOURCE": zoo.build("llama")[0],
        "YOU/products": classifier,
        "runs/pretrain_bert/model": classifier,
        "glue_bert": classifier,
        "pretrain_bert": pretrain_bert.build_model(pretrain_bert.RecipeArguments(**small), words, 0),
        "pretrain_gpt2": pretrain_gpt2.build_model(pretrain_gpt2.RecipeArguments(**small), words, 0),
        "train_vit": train_vit.build_model(train_vit.RecipeArguments(**small), ["cat", "dog"], 0),
        "translate_marian": translate_marian.build_model(translate_marian.RecipeArguments(**small), words, 0),
        "tag_morphology": tag_morphology.build_model(tag_morphology.RecipeArguments(**small), words, ["X", "Y"], 0),
    }
    for name, model in models.items():
        model.save_pretrained(place / name)
        words.save_pretrained(place / name)
    (place / "FILE").write_text("\n".join(" ".join(f"w{5 + (7 * n + k) % 90}" for k in range(40)) for n in range(90)))
    for folder in ("RUN", "SERIAL_RUN", *(recipe(name).parse([])[1].output_dir for name in RECIPES)):
        write_run(place / folder, history())
    measured = ["--random", "--batches", "1", "--batch-size", "2", "--tokens", "8", "--coarsening", "2"]
    assert hf_layerpar(["check", str(place / "SOURCE"), *measured, "--json", str(place / "check.json")]) == 0
    return place


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small are slower with more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def inside(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative names are those of `place`, for tests that ask for it."""
    if "place" in request.fixturenames:
        monkeypatch.chdir(request.getfixturevalue("place"))


def given() -> dict[str, Any]:
    """Names that a snippet doesn't make itself."""
    samples = runs.Samples("bert_classifier", 16)
    return {
        "torch": torch,
        "AutoModelForCausalLM": hf.AutoModelForCausalLM,
        "config": zoo.config("gpt2", 8),
        "model": runs.build("bert_classifier"),
        "train": runs.Samples("bert_classifier", 64),
        "validation": samples,
        "loader": list(torch.utils.data.DataLoader(samples, 8)),
    }


def run_python(place: Path, name: str, code: str, above: Sequence[str]) -> dict[str, Any]:
    """The names that the snippet leaves. above: the page's snippets before it, whose imports hold for it too."""
    names = given()
    imports = [node for text in above for node in ast.parse(text).body if isinstance(node, ast.Import | ast.ImportFrom)]
    before = Path.cwd()
    os.chdir(place)
    try:
        exec(compile(ast.Module(imports, []), name, "exec"), names)
        exec(compile(code, name, "exec"), names)
    finally:
        os.chdir(before)
    return names


def on_rank(*arguments: Any) -> None:
    run_python(*arguments)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    hub = Endpoint(tmp_path_factory.mktemp("hub"))
    yield hub
    hub.close()


@pytest.fixture(scope="module")
def ranks(hub: Endpoint, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    """Two that talk to the stand-in of the Hub."""
    home = {"HF_HOME": str(tmp_path_factory.mktemp("home")), "CUDA_VISIBLE_DEVICES": ""}
    pool = RankPool(2, hub.environment | home)
    yield pool
    pool.close()


@pytest.mark.parametrize(("page", "line", "code"), snippets(fenced, "python"))
def test_python(page: str, line: int, code: str, place: Path, request: pytest.FixtureRequest) -> None:
    arguments = (place, f"{page}:{line}", code, [text for at, text in fenced(page, "python") if at < line])
    if _TWO_RANKS.search(code):
        request.getfixturevalue("ranks").run(on_rank, *arguments)
    else:
        names = run_python(*arguments)
        if page in CARDS:
            assert f"`{type(names['model']).__name__}`" in (ROOT / page).read_text("utf-8")
    for folder in re.findall(r'save_model\("(.*?)"\)|save_pretrained\("(.*?)"\)', code):
        hf.AutoModelForSequenceClassification.from_pretrained(place / "".join(folder))
    for repository in re.findall(r'push_to_hub\("(.*?)"\)', code):
        assert "model.safetensors" in request.getfixturevalue("hub").files(repository)


# ---- commands
class Accepted(Exception):
    """By a parser."""


def accepted(main: Callable[[], Any], arguments: Sequence[str]) -> None:
    """Fails unless the parser that `main` makes takes the arguments; nothing of `main` runs after it."""
    assert "parse_args" in inspect.getsource(main)
    stock = ArgumentParser.parse_args

    def parse_args(self: ArgumentParser, args: Any = None, namespace: Any = None) -> None:
        raise Accepted(stock(self, args, namespace))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ArgumentParser, "parse_args", parse_args)
        patch.setattr(sys, "argv", ["command", *arguments])
        with pytest.raises(Accepted):
            main()


def recipe(name: str) -> Any:
    return importlib.import_module(f"recipes.{name}")


def succeeds(*command: str | Path, may: tuple[int, ...] = (0,)) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode in may, f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}"


def check_script(path: str, arguments: Sequence[str]) -> None:
    """One of this repository."""
    assert Path(path).is_file(), f"there is no {path}"
    module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    if hasattr(module, "parse"):  # a recipe
        _, args = module.parse(list(arguments))
        missing = [word for word in arguments if word.startswith("runs/") and not Path(word).exists()]
        assert not missing, f"no recipe makes {missing}"
        assert not args.push_to_hub or args.hub_model_id
    elif hasattr(module, "main"):
        accepted(module.main, arguments)
    else:
        assert not arguments, f"{path} takes no arguments"


def check_python(arguments: Sequence[str]) -> None:
    if arguments[0] == "-m":
        assert arguments[1] == "venv"
        accepted(venv.main, arguments[2:])
    else:
        check_script(arguments[0], arguments[1:])


def check_pip(arguments: Sequence[str]) -> None:
    succeeds(sys.executable, "-m", "pip", *arguments, "--help")
    assert Path(arguments[arguments.index("-c") + 1]).is_file()
    for extra in re.findall(r"\.\[(\w+)\]", " ".join(arguments)):
        assert re.search(rf"^{extra} = \[", Path("pyproject.toml").read_text("utf-8"), re.M), f"no extra {extra}"


def check_accelerate(arguments: Sequence[str]) -> None:
    assert arguments[0] == "launch"
    parser = launch_command_parser()
    has_script = any(word.endswith(".py") for word in arguments)
    found = parser.parse_args([*arguments[1:], *([] if has_script else ["train.py"])])
    assert found.config_file is None or Path(found.config_file).is_file(), f"there is no {found.config_file}"
    if found.training_script != "train.py":
        check_script(found.training_script, found.training_script_args)


def check_pytest(arguments: Sequence[str]) -> None:
    """By a run of one small test, which a marker may leave out."""
    Path("test_one.py").write_text("def test_one(): ...")
    markers = ["-o", "markers=slow compat gpu", "-p", "no:cacheprovider"]
    succeeds(sys.executable, "-m", "pytest", "-c", os.devnull, *markers, *arguments, "test_one.py", may=(0, 5))


def check_hf(arguments: Sequence[str]) -> None:
    succeeds(Path(sys.executable).with_name("hf"), *arguments, "--help")


@functools.cache
def exit_code(*arguments: str) -> int:
    """Of a command that several pages may have."""
    return hf_layerpar(arguments)


def check_hf_layerpar(arguments: Sequence[str]) -> None:
    """By running it."""
    if len(arguments) == 1:  # the command's name only, in the running text
        with pytest.raises(SystemExit) as end:
            hf_layerpar([*arguments, "--help"])
        assert end.value.code == 0
        return
    if "--choose" in arguments:  # the search takes minutes at the page's depth
        depth = arguments.index("--layers") + 1
        arguments = [*arguments[:depth], "16", *arguments[depth + 1 :]]
    assert exit_code(*arguments) == 0
    for name in ("--png", "--json"):
        if name in arguments:
            assert Path(arguments[arguments.index(name) + 1]).is_file()


CHECKS: dict[str, Callable[[Sequence[str]], None]] = {
    "python": check_python,
    "python3": check_python,
    "pip": check_pip,
    "accelerate": check_accelerate,
    "pytest": check_pytest,
    "hf": check_hf,
    "hf-layerpar": check_hf_layerpar,
}


def commands_of(place: Path, script: str) -> list[list[str]]:
    """What bash makes of a block: each command's words. The commands themselves only write down what they are given."""
    bash, programs, said = shutil.which("bash"), place / ".venv" / "bin", place / "said"
    assert bash is not None
    programs.mkdir(parents=True, exist_ok=True)
    (programs / "activate").touch()
    for name in CHECKS:
        (programs / name).write_text(f"#!{bash}\nprintf '%s\\0' \"${{0##*/}}\" \"$@\" $'\\n' >> '{said}'\n")
        (programs / name).chmod(0o755)
    said.unlink(missing_ok=True)
    done = subprocess.run(
        [bash, "-euo", "pipefail", "-c", script],
        cwd=place,
        env={"PATH": str(programs)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [words.split("\0")[:-1] for words in said.read_text().split("\n\0")[:-1]]


@pytest.mark.parametrize(("page", "line", "script"), snippets(fenced, "bash", "sh"))
def test_shell(page: str, line: int, script: str, place: Path) -> None:
    commands = commands_of(place, script)
    assert len(commands) >= len(re.findall(r"^\S", re.sub(r"^#.*|^(for|done).*", "", script, flags=re.M), re.M))
    for name, *arguments in commands:
        CHECKS[name](arguments)


@pytest.mark.parametrize(("page", "line", "words"), snippets(inline))
def test_commands_in_the_text(page: str, line: int, words: list[str], place: Path) -> None:
    CHECKS[Path(words[0]).name](words[1:])
