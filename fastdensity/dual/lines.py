"""The user's lines in a stack: those of neither torch's files nor this package's."""

from __future__ import annotations

import traceback
from pathlib import Path

import torch

_TORCH = str(Path(torch.__file__).parent)
_HERE = str(Path(__file__).parent.parent)


def user_frames(summary: traceback.StackSummary) -> list[traceback.FrameSummary]:
    """The frames that are neither torch's nor this package's."""
    return [frame for frame in summary if is_users(frame.filename)]


def is_users(filename: str) -> bool:
    """Is this file neither torch's nor this package's?"""
    return not filename.startswith((_TORCH, _HERE, "<"))


def innermost(summary: traceback.StackSummary) -> str:
    """The user's line that was being run: 'file:line, `code`'."""
    frames = user_frames(summary)
    return f"{frames[-1].filename}:{frames[-1].lineno}, `{frames[-1].line}`" if frames else "an unknown line"
