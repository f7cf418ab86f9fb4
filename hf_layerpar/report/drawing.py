"""matplotlib, imported when something is drawn: it is an optional dependency."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

from hf_layerpar.errors import ConfigurationError, LayerParallelError

FORMATS = (".png", ".pdf", ".svg")


def check_picture(path: Path | str) -> None:
    """Before a picture is made: raises ConfigurationError for a name of another format, FileNotFoundError where its
    folder is missing, and LayerParallelError without matplotlib."""
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise ConfigurationError(f"{path} is no name of a picture; give one that ends in {', '.join(FORMATS)}")
    check_folder(path)
    matplotlib_classes()


def check_folder(path: Path) -> None:
    """Raises FileNotFoundError where the folder of a file to write is missing."""
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path.parent))


def matplotlib_classes() -> tuple[Any, Any]:
    """matplotlib's Figure (which writes files without any window system) and Patch.

    Raises LayerParallelError when it isn't installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise LayerParallelError(
            "drawing needs matplotlib, which is not installed; pip install 'hf_layerpar[report]'"
        ) from error
    return Figure, Patch
