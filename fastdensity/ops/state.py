"""What the closed loop of guidance remembers of each row between two steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdensity.boundary import check_state, describe
from fastdensity.reference.track import MEMORY


@dataclass(slots=True)
class GuidanceState:
    """A row's place in its closed loop: hold it between steps, save it, restore it, reset rows of it.

    A step replaces the three tensors and never writes into one, so a kept copy of the object is a checkpoint. A
    server that keeps nothing between calls can send `state_dict()` along with the latents.

    Attributes:
        sample: (B, *) the state at the last step. eps: (B, *) the predicted noise there. None in a fresh state.
        memory: (B, len(MEMORY)) float64, numbers named by `fastdensity.reference.track.MEMORY`.
    """

    sample: Tensor | None
    eps: Tensor | None
    memory: Tensor

    @classmethod
    def fresh(cls, sample: Tensor) -> GuidanceState:
        """Of rows like `sample` (B, *) that have not made a step yet.

        Raises:
            TypeError, ValueError: sample is no floating tensor with a batch.
        """
        check_state("sample", sample)
        return cls(None, None, torch.zeros(sample.shape[0], len(MEMORY), dtype=torch.float64, device=sample.device))

    def _number(self, name: str) -> Tensor:
        return self.memory[:, MEMORY.index(name)]

    @property
    def commanded(self) -> Tensor:
        """(B,) nats over -div u that guidance asked for, the step under way included."""
        return self._number("commanded") + self._number("commanded_next")

    @property
    def realised(self) -> Tensor:
        """(B,) nats that came of it: measured up to the last network call, expected of the step after it."""
        return self._number("realised") + self._number("realised_next")

    @property
    def residual(self) -> Tensor:
        """(B,) commanded - realised, what is still owed."""
        return self.commanded - self.realised

    @property
    def limited(self) -> Tensor:
        """(B,) steps in which the loop was kept from an eta that one step cannot follow."""
        return self._number("limited")

    def reset(self, rows: Tensor | None = None) -> GuidanceState:
        """A state in which these rows (a bool mask (B,), default all) begin anew.

        Raises:
            TypeError, ValueError: rows is no mask of this batch.
        """
        if rows is None:
            return GuidanceState(None, None, torch.zeros_like(self.memory))
        if not isinstance(rows, Tensor) or rows.dtype is not torch.bool:
            raise TypeError(f"rows must be a bool tensor (B,), got {describe(rows)}")
        if rows.shape != self.memory.shape[:1]:
            raise ValueError(f"rows must have shape ({self.memory.shape[0]},), got {describe(rows)}")
        return GuidanceState(self.sample, self.eps, self.memory.masked_fill(rows[:, None].to(self.memory.device), 0.0))

    def select(self, rows: Tensor) -> GuidanceState:
        """The state of these rows, by index or mask, in their order."""
        if self.sample is None or self.eps is None:
            return GuidanceState(None, None, self.memory[rows])
        return GuidanceState(self.sample[rows], self.eps[rows], self.memory[rows])

    @staticmethod
    def cat(states: Sequence[GuidanceState], like: Tensor) -> GuidanceState:
        """One state of several batches of rows like `like`; fresh ones among them get vectors of zeros.

        Raises:
            ValueError: no states.
        """
        if not states:
            raise ValueError("states must not be empty")
        memory = torch.cat([state.memory for state in states])
        if all(state.sample is None for state in states):
            return GuidanceState(None, None, memory)

        def rows(state: GuidanceState, vector: Tensor | None) -> Tensor:
            return like.new_zeros((state.memory.shape[0], *like.shape[1:])) if vector is None else vector

        samples = torch.cat([rows(state, state.sample) for state in states])
        return GuidanceState(samples, torch.cat([rows(state, state.eps) for state in states]), memory)

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors to save, by name; a fresh state has no vectors."""
        named = {"sample": self.sample, "eps": self.eps, "memory": self.memory}
        return {name: tensor.detach().clone() for name, tensor in named.items() if tensor is not None}

    @classmethod
    def from_state_dict(cls, saved: dict[str, Any]) -> GuidanceState:
        """What `state_dict` gave.

        Raises:
            TypeError, ValueError: something else, or a state of another version.
        """
        memory = saved.get("memory") if isinstance(saved, dict) else None
        if not isinstance(memory, Tensor):
            raise TypeError(f"saved must be what GuidanceState.state_dict() gave, got {describe(saved)}")
        if memory.dim() != 2 or memory.shape[1] != len(MEMORY) or memory.dtype is not torch.float64:
            raise ValueError(
                f"saved['memory'] must be float64 of shape (B, {len(MEMORY)}), got {describe(memory)}: "
                "it is of another version"
            )
        return cls(saved.get("sample"), saved.get("eps"), memory)
