"""The seam to other libraries: what is private in them is named in here and nowhere else, and looked for on import."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from contextlib import contextmanager

from packaging.requirements import Requirement
from packaging.version import Version

from hf_layerpar.errors import UnsupportedVersionError


def unsupported(library: str, found: str) -> UnsupportedVersionError:
    """found: what is not as it should be."""
    return UnsupportedVersionError(
        f"{library} {importlib.metadata.version(library)} is not a version that hf_layerpar works with: {found}. "
        f"Install {_window(library) or f'the {library} of pyproject.toml'}"
    )


@contextmanager
def looking_into(library: str) -> Iterator[None]:
    """Around the imports from a library: raises UnsupportedVersionError for a name that isn't there, and for a version
    in which names are there and mean something else."""
    window = _window(library)
    if window is not None:
        lowest = min(Version(each.version) for each in window.specifier if each.operator == ">=")
        if Version(importlib.metadata.version(library)) < lowest:
            raise unsupported(library, "it is too old")
    try:
        yield
    except (ImportError, AttributeError) as error:
        raise unsupported(library, str(error)) from error


def _window(library: str) -> Requirement | None:
    """The versions that pyproject.toml allows; None where this package isn't installed, but run from its source."""
    try:
        wanted = importlib.metadata.requires("hf_layerpar") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((each for each in map(Requirement, wanted) if each.name == library and each.marker is None), None)
