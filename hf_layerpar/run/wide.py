"""The dtype to sum in."""

from __future__ import annotations

import torch


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for 16-bit states, whose differences are small, else the state's own."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
