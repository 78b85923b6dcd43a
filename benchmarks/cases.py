"""What the rows benchmark runs on: shapes, and the bytes that each rule cannot avoid moving."""

from __future__ import annotations

ROW_SHAPES = ((256, 3_072), (64, 16_384), (8, 196_608), (64, 196_608))

# Row vectors read and written, each once.
OPERANDS = {"guided_drift": (3, 1), "guided_step": (2, 1)}


def least_bytes(rule: str, rows: int, columns: int, bytes_per_element: int = 4) -> int:
    """Bytes of each operand read once and the result written once."""
    read, written = OPERANDS[rule]
    return (read + written) * rows * columns * bytes_per_element
