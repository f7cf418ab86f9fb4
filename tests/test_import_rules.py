"""Who may import whom: the numerics stay free of transformers and torch.distributed, and data flows one way."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import Seq2SeqTrainer

import hf_layerpar
from hf_layerpar import LayerParallelTrainer
from hf_layerpar.compat.trainer import CALLED, OVERRIDDEN, WHILE_TRAINING, check_trainer
from hf_layerpar.errors import LayerParallelError, UnsupportedVersionError

ROOT = Path(hf_layerpar.__file__).parent

FORBIDDEN = {
    "plan": (
        *("torch", "transformers", "accelerate", "hf_layerpar.compat", "hf_layerpar.run", "hf_layerpar.ode"),
        "hf_layerpar.training",
    ),
    "run": (
        *("transformers", "accelerate", "hf_layerpar.ode", "hf_layerpar.training"),
        *("hf_layerpar.compat.transformers", "hf_layerpar.compat.trainer", "hf_layerpar.compat.accelerate"),
    ),
    "ode": (
        *("torch.distributed", "accelerate", "hf_layerpar.plan", "hf_layerpar.run", "hf_layerpar.training"),
        *("hf_layerpar.compat.trainer", "hf_layerpar.compat.accelerate"),
    ),
    "hub": (
        *("torch", "accelerate", "hf_layerpar.plan", "hf_layerpar.ode", "hf_layerpar.run"),
        *("hf_layerpar.sharding", "hf_layerpar.training"),
    ),
    "config.py": ("torch", "transformers"),
    "errors.py": ("torch", "transformers"),
    **dict.fromkeys(
        (
            *("sharding.py", "placing.py", "refusals.py", "comparing.py", "stepping.py", "shared_gradients.py"),
            *("calling.py", "agreement.py", "diagnosis", "checkpoint"),
        ),
        ("accelerate", "hf_layerpar.training"),
    ),
    "diagnosis/readings.py": ("torch", "transformers"),
    "diagnosis/suggest.py": ("torch", "transformers"),
    "diagnosis/predict.py": ("torch", "transformers"),
}


LIBRARIES = {
    "torch": None,
    "transformers": {"", "utils", "cache_utils", "trainer_utils"},
    "accelerate": {"", "utils"},
    "peft": {""},
    "huggingface_hub": {"", "utils", "errors"},
}
"""Modules of other libraries that their documentation names (None: all whose names have no underscore)."""


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("part", FORBIDDEN)
def test_forbidden_imports(part):
    files = sorted((ROOT / part).rglob("*.py")) if (ROOT / part).is_dir() else [ROOT / part]
    assert files
    for file in files:
        for name in imports(file):
            bad = [f for f in FORBIDDEN[part] if name == f or name.startswith(f + ".")]
            assert not bad, f"{file.relative_to(ROOT)} imports {name}"


def outside_compat() -> list[tuple[Path, ast.Module]]:
    files = [file for file in sorted(ROOT.rglob("*.py")) if "compat" not in file.relative_to(ROOT).parts]
    return [(file, ast.parse(file.read_text())) for file in files]


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_what_is_private_in_a_library_is_imported_in_compat_only():
    for file, tree in outside_compat():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Import | ast.ImportFrom):
                continue
            module = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
            library, _, inside = (module or "").partition(".")
            if library not in LIBRARIES:
                continue
            names = [*inside.split("."), *(alias.name for alias in node.names if isinstance(node, ast.ImportFrom))]
            where = f"{file.relative_to(ROOT)}:{node.lineno} imports {module}"
            assert not any(is_private(name) for name in names), where
            assert LIBRARIES[library] is None or inside in LIBRARIES[library], where


def test_private_attributes_of_others_are_used_in_compat_only():
    """Those that nothing in this package defines."""
    defined, used = {*CALLED, *WHILE_TRAINING}, []
    for file, tree in outside_compat():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                defined.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                defined.add(node.id)
            elif isinstance(node, ast.Attribute) and is_private(node.attr):
                of_self = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
                if of_self and isinstance(node.ctx, ast.Store):
                    defined.add(node.attr)
                else:
                    used.append((node.attr, f"{file.relative_to(ROOT)}:{node.lineno}"))
    assert [(name, where) for name, where in used if name not in defined] == []


def test_methods_of_the_stock_trainer_that_are_replaced_are_listed():
    classes = [c for c in LayerParallelTrainer.__mro__ if c.__module__.startswith("hf_layerpar.")]
    mine = {name for c in classes for name in vars(c) if not name.startswith("__")}
    assert {name for name in mine if callable(getattr(Seq2SeqTrainer, name, None))} == set(OVERRIDDEN)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda stock: setattr(stock, "_save_rng_state", None), "has no _save_rng_state"),
        (lambda stock: setattr(stock, "log", lambda self, logs, when, start_time=None: None), "log takes .logs, when"),
        (lambda stock: setattr(stock, "push_to_hub", lambda self, commit_message="": None), "push_to_hub takes"),
    ],
)
def test_a_trainer_of_another_kind_is_refused(change, message):
    class Stock(Seq2SeqTrainer):
        pass

    check_trainer(Stock)
    change(Stock)
    with pytest.raises(UnsupportedVersionError, match=rf"{message}.*Install transformers[<>]") as refused:
        check_trainer(Stock)
    assert isinstance(refused.value, LayerParallelError)
    assert isinstance(refused.value, ImportError)


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, hf_layerpar; assert not {'torch', 'transformers', 'accelerate'} & set(sys.modules), sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names():
    assert 0 < len(hf_layerpar.__all__) <= 12
    for name in hf_layerpar.__all__:
        assert getattr(hf_layerpar, name).__doc__
    assert set(hf_layerpar.__all__) <= set(dir(hf_layerpar))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = hf_layerpar.no_such_name
