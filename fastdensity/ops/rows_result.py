"""What a guided step returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class StepResult:
    """A guided step: the new sample, and what happened in each row.

    Attributes:
        sample: (B, *), the dtype of the state.
        report: (B, 4), one row of numbers per sample, columns as in `fastdensity.rules.REPORT_COLUMNS`.
    """

    sample: Tensor
    report: Tensor

    @property
    def eta(self) -> Tensor:
        """(B,) the factor on the predicted noise; 1 on rows left unguided."""
        return 1.0 + self.report[:, 0]

    @property
    def eta_minus_one(self) -> Tensor:
        """(B,) eta - 1, which keeps its digits where eta itself rounds to 1 (large D, low precision)."""
        return self.report[:, 0]

    @property
    def sq_norm(self) -> Tensor:
        """(B,) ||eps||^2 of the predicted noise."""
        return self.report[:, 1]

    @property
    def dlogp(self) -> Tensor:
        """(B,) nats that guidance adds to log p, to first order: (eta - 1) ||eps||^2 d ln(alpha / sigma)."""
        return self.report[:, 2]

    @property
    def flags(self) -> Tensor:
        """(B,) bits of `fastdensity.rules.FLAG_*`; 0 where the row was guided as asked."""
        return flags_of(self.report)


def flags_of(report: Tensor) -> Tensor:
    """Of a report (B, 4), its bits of `fastdensity.rules.FLAG_*`, (B,) int64."""
    return report[:, 3].to(torch.int64)
