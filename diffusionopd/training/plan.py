"""The plan of a run: a checked configuration, and the counts that follow from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from diffusionopd.algorithms import Algorithm
from diffusionopd.algorithms.settings import Nfe, RoundPlan
from diffusionopd.config_schema import read
from diffusionopd.data.rounds import ALTERNATE
from diffusionopd.data.tasks import Task
from diffusionopd.models.settings import FROM_TEACHERS
from diffusionopd.models.teacher_models import TeacherModel
from diffusionopd.training.settings import RunSettings, WatchSettings

T = TypeVar("T")


@dataclass(frozen=True)
class Plan(RoundPlan):
    """A checked configuration and the counts that follow from it."""

    values: Mapping[str, Any]  # flat
    algorithm: type[Algorithm]
    run: RunSettings
    watch: WatchSettings
    num_prompts: tuple[int, ...]  # training prompts of each task
    num_evaluated: tuple[int, ...]  # test prompts of each task in an evaluation; 0 where that is not known
    notes: tuple[str, ...]  # settings that are accepted but change nothing
    teacher_models: Mapping[str, TeacherModel]

    @property
    def teachers(self) -> tuple[Task, ...]:
        """The tasks whose teachers are used: all or none."""
        return self.tasks if self.algorithm.uses_teachers(self.values) else ()

    @property
    def starts(self) -> tuple[Task, ...]:
        """The teachers whose layers the student adapts, too: those that it starts from, where no layers are named."""
        told = self.values["train.lora_target_modules"] or self.values["train.student_init"] != FROM_TEACHERS
        return () if told else self.teachers

    def read(self, group: type[T]) -> T:
        """The settings of a group."""
        return read(group, self.values)

    @property
    def nfe_per_round(self) -> Nfe:
        """Forward passes of the transformer per round, over all processes."""
        return self.algorithm.count(self)

    @property
    def evaluation_nfe(self) -> int:
        """Forward passes of an evaluation, over all processes."""
        made = [{}, *self.watch.eval_variants.values()] if self.watch.eval_freq else []
        return sum(
            prompts
            * own.get("num_steps", task.eval_num_steps)
            * self.nfe(own.get("guidance_scale", task.eval_guidance_scale))
            for task, prompts in zip(self.tasks, self.num_evaluated, strict=True)
            for own in made
        )

    def costly(self) -> list[str]:
        """A note where evaluations take more forward passes than the rounds between them."""
        one, own = self.evaluation_nfe, self.nfe_per_round
        rounds = (own.student + own.teacher + own.sampling + own.base) * self.watch.eval_freq
        if one <= rounds:
            return []
        times = f"{one / rounds:.1f} times the forward passes of the {self.watch.eval_freq} rounds between two"
        return [f"an evaluation takes {times}: eval_num_prompts and eval_freq say how many there are"]

    def wants_scores(self, number: int) -> bool:
        """Whether the images of round ``number`` (from 1) are scored: the first's, every so many rounds, the last's."""
        return not self.algorithm.has_rewards and self._is_watched(number, self.watch.monitor_freq)

    def wants_grid(self, number: int) -> bool:
        """Whether the images of round ``number`` (from 1) become a grid."""
        return self._is_watched(number, self.watch.sample_freq)

    def _is_watched(self, number: int, every: int) -> bool:
        # Where tasks alternate, single rounds might always be the same one's.
        row, rounds = self.shape.num_tasks if self.shape.task_order == ALTERNATE else 1, self.shape.num_rounds
        return every > 0 and (number <= row or number > rounds - row or number % every < row)
