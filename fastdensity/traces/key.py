"""What names the probes of an estimate: Philox counters, see `fastdensity.reference.probe`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fastdensity.reference.probe import STREAM_MEASURE


@dataclass(frozen=True, slots=True)
class ProbeKey:
    """seed; sample_ids int64 (B,), one per row; step; stream: of probes that measure, or of those that steer."""

    seed: int
    sample_ids: Tensor
    step: int = 0
    stream: int = STREAM_MEASURE

    def rows(self, index: Tensor) -> ProbeKey:
        """The key of these rows."""
        return ProbeKey(self.seed, self.sample_ids[index], self.step, self.stream)
