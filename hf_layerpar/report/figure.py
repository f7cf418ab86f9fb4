"""matplotlib, imported only where something is drawn."""

from __future__ import annotations

from typing import Any

from hf_layerpar.errors import LayerParallelError


def matplotlib_classes() -> tuple[Any, Any]:
    """matplotlib's Figure (which writes files without any window system) and Patch.

    Raises LayerParallelError when matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise LayerParallelError(
            "drawing needs matplotlib, which is not installed; pip install 'hf_layerpar[report]'"
        ) from error
    return Figure, Patch
