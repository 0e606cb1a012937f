"""The distillation loss beside a reward's: `train.distill_weight` of the algorithms that learn from rewards."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from diffusionopd.algorithms.results import Losses
from diffusionopd.config_schema import key
from diffusionopd.data.batches import Batch
from diffusionopd.losses import TARGETS, distillation_loss
from diffusionopd.rollout import Target
from diffusionopd.transitions import Transition


@dataclass(frozen=True)
class ComparisonSettings:
    """What distillation compares."""

    target: str = key("train.target", "mean", choices=TARGETS)
    """In which quantity the distillation loss "kl" compares: "mean" of the step (the paper's), "velocity", or "x0"."""
    self_normalize: bool = key("train.self_normalize", False)
    """Divide each sample's error by its own mean magnitude (detached)."""


class Pull:
    """A round's distillation losses towards the tasks' targets, to be added to those of its rewards."""

    def __init__(self, weight: float, settings: ComparisonSettings, table: Losses) -> None:
        """``table``: empty, for all batches of the round."""
        self._weight, self._settings, self._table = weight, settings, table

    def loss(
        self, batch: Batch, step: int, transition: Transition, v_student: Tensor, target: Target, note: bool
    ) -> Tensor:
        """The weighted loss ``[B]`` at a state, of the student's guided velocity there; ``note`` it for the metrics."""
        s = self._settings
        loss = distillation_loss(transition, v_student, target.v.guided, s.target, s.self_normalize)
        if note:
            self._table.add(batch, step, loss)
        return self._weight * loss

    def metrics(self) -> dict[str, float]:
        """``distill/<task>``: the means of the noted losses, without the weight. Collective."""
        self._table.reduce()
        return {f"distill/{task}": mean for task, mean in self._table.means().items()}
