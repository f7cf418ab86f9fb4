"""Settings as options of a command: what a field of their dataclass says of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

from hf_layerpar.config import help_of


def add_setting(parser: Any, kind: type, name: str, *, unset: str | None = None, **more: Any) -> None:
    """Adds the option of one field of `kind`.

    unset: what happens where it isn't given; it is None then. Otherwise it has the field's default.
    more: keywords of `add_argument`.
    """
    default = getattr(kind, name) if unset is None else None
    hint = get_type_hints(kind)[name]
    if hint is bool:
        words: dict[str, Any] = {"action": "store_true"}
    elif get_origin(hint) is Literal:
        words = {"choices": get_args(hint)}
    elif hint in (int, float, str):
        words = {"type": hint, "metavar": {int: "N", float: "X", str: "NAME"}[hint]}
    else:  # one whole number or several
        words = {"type": int, "nargs": "+", "metavar": "N"}
    words |= {"default": default, "help": f"{help_of(kind, name)} (default: {unset or _text(default)})"}
    parser.add_argument(f"--{name.replace('_', '-')}", **words | more)


def listed(kind: type, names: Sequence[str]) -> str:
    """Fields with what they mean and their defaults, a line each."""
    width = max(map(len, names))
    return "\n".join(f"  {name:{width}}  {help_of(kind, name)} ({_text(getattr(kind, name))})" for name in names)


def _text(default: Any) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, tuple):
        return " ".join(map(str, default))
    return f"{default:g}" if isinstance(default, float) else str(default)
