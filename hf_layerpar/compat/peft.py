"""PEFT, which is optional, asked before it puts an adapter on a model."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import nn


def before_adapters(check: Callable[[nn.Module], None]) -> None:
    """From now on PEFT, where it was imported before, calls check(model) before it makes an adapter's parameters. More
    calls do nothing."""
    if "peft" not in sys.modules:
        return
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTuner

    for of, name in ((PeftModel, "__init__"), (BaseTuner, "inject_adapter")):
        stock = getattr(of, name)
        if not hasattr(stock, "__wrapped__"):
            setattr(of, name, _checked(stock, check))


def _checked(stock: Any, check: Callable[[nn.Module], None]) -> Any:
    @wraps(stock)
    def method(self: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        check(model)
        return stock(self, model, *args, **kwargs)

    return method
