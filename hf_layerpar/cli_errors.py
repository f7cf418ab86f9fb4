"""How the commands refuse: one line on stderr and exit code 2, also where a library chokes on what it was given."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from hf_layerpar.errors import CheckpointError, LayerParallelError

REFUSED = 2
_MOST = 2000  # characters


class Parser(argparse.ArgumentParser):
    """An argument parser that refuses in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(REFUSED, f"{one_line(f'{self.prog}: {message}; see {self.prog} --help')}\n")


def refused(error: Exception) -> int:
    """Says why on stderr."""
    said = str(error) if isinstance(error, LayerParallelError | OSError) else f"{type(error).__name__}: {error}"
    if isinstance(error, MemoryError):
        said = "there is not enough memory for it; ask for something smaller"
    print(one_line(f"hf-layerpar: {said}"), file=sys.stderr)
    return REFUSED


def one_line(text: str) -> str:
    # bytes of the command line that are no UTF-8 come as lone surrogates, which no stream takes
    text = " ".join(text.encode(errors="backslashreplace").decode().split())
    return text if len(text) <= _MOST else f"{text[:_MOST]} ..."


@contextmanager
def reading(source: Any) -> Iterator[None]:
    """Names the checkpoint that a library can't read (truncated weights, an odd config.json or tokenizer).

    Raises CheckpointError instead of what isn't ours.
    """
    try:
        yield
    except (LayerParallelError, OSError, MemoryError):
        raise
    except Exception as error:
        raise CheckpointError(
            f"{source} can't be read as a checkpoint of transformers ({type(error).__name__}: {error}); look at its "
            "config.json, its tokenizer and its weights, or get it anew"
        ) from error
