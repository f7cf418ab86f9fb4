"""Who may import whom: the numerics stay free of transformers and torch.distributed, and data flows one way."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hf_layerpar

ROOT = Path(hf_layerpar.__file__).parent

FORBIDDEN = {
    "plan": ("torch", "transformers", "accelerate", "hf_layerpar.run", "hf_layerpar.ode", "hf_layerpar.training"),
    "run": ("transformers", "accelerate", "hf_layerpar.ode", "hf_layerpar.training"),
    "ode": ("torch.distributed", "accelerate", "hf_layerpar.plan", "hf_layerpar.run", "hf_layerpar.training"),
    "hub": (
        *("torch", "accelerate", "hf_layerpar.plan", "hf_layerpar.ode", "hf_layerpar.run"),
        *("hf_layerpar.sharding", "hf_layerpar.training"),
    ),
    "config.py": ("torch", "transformers"),
    "errors.py": ("torch", "transformers"),
    "sharding.py": ("accelerate", "hf_layerpar.training"),
    "agreement.py": ("accelerate", "hf_layerpar.training"),
    "diagnosis": ("accelerate", "hf_layerpar.training"),
    "diagnosis/readings.py": ("torch", "transformers"),
    "diagnosis/suggest.py": ("torch", "transformers"),
    "diagnosis/predict.py": ("torch", "transformers"),
}


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
