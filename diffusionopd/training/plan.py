"""The plan of a run: a checked configuration, the counts that follow from it, and how they are told to people."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from diffusionopd.algorithms import Algorithm
from diffusionopd.algorithms.optim import EmaSettings, OptimizerSettings
from diffusionopd.algorithms.settings import Nfe, RoundPlan
from diffusionopd.config_schema import read, unset
from diffusionopd.config_schema.paths import with_origin
from diffusionopd.data.rounds import ALTERNATE, CASCADE, TOGETHER
from diffusionopd.data.tasks import Task, loss_weights
from diffusionopd.models.loading import DTYPES
from diffusionopd.models.schedules import FAMILY
from diffusionopd.models.settings import FROM_TEACHERS
from diffusionopd.models.teacher_models import TeacherModel
from diffusionopd.training.keys import ema_repeats
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

    def describe(self) -> str:
        """The plan as a table for people, without a trailing newline."""
        shape, nfe = self.shape, self.nfe_per_round
        batches = f"{shape.batches_per_task} batch{'' if shape.batches_per_task == 1 else 'es'} per process"
        visits = f"each with {shape.drawn} drawn tasks" if shape.drawn else _VISITS[shape.task_order]
        average = " on average" if len(self.algorithm.steps(self, (0, 0, 0))) < self.sampler.trained_steps else ""
        rows = [
            ("model", with_origin(self.values["pretrained.model"])),
            ("written to", str(self.run.run_dir)),
            ("rounds", f"{shape.num_rounds}, {visits}"),
            ("processes", f"{shape.num_processes}, {shape.batch_size} images per batch in each"),
            ("per round", self._round()),
            ("per task", f"{shape.images_per_task} images of {shape.groups_per_task} prompts, in {batches}"),
            ("side by side", self._passes()),
            ("blocks", "compiled: the first round takes minutes longer" if self.values["compile"] else ""),
            ("images", self._images()),
            ("sampler steps", self._steps()),
            ("student guidance", _guidance(self.sampler.guidance)),
            ("learning rate", self._rate()),
            ("average", self._average()),
            ("student NFE", f"{nfe.student} per round, with gradient"),
            ("teacher NFE", nfe.teacher and f"{nfe.teacher} per round"),
            ("sampling NFE", nfe.sampling and f"{nfe.sampling} per round{average}"),
            ("base NFE", nfe.base and f"{nfe.base} per round, for train.beta and the references of targets"),
            ("evaluations", self._evaluations()),
        ]
        for task, prompts, weight in zip(self.tasks, self.num_prompts, loss_weights(self.tasks), strict=True):
            rounds = prompts / shape.groups_per_task * (shape.num_tasks / shape.tasks_per_round)
            folders = f" in {len(task.folders)} folders" if len(task.folders) > 1 else ""
            rows += [(f"task {task.name}", f"{prompts} prompts{folders}, as many as {rounds:g} rounds draw")]
            rows += [("", self._source(task) + (f", its loss times {weight:g}" if weight != 1.0 else ""))]
        rows += [("teacher model", self._teacher_model(model)) for model in self.teacher_models.values()]
        if not unset(start := self.values["train.lora_path"]):
            rows += [("student", f"starts from {with_origin(start)}")]
        rows = [(name, value) for name, value in rows if value]
        width = max(len(name) for name, _ in rows)
        return "\n".join([f"{name:<{width}}  {value}" for name, value in rows] + [f"note: {n}" for n in self.notes])

    def _round(self) -> str:
        shape = self.shape
        steps = shape.backward_batches // shape.batches_per_step
        optimizer = f"{steps} optimizer step{'' if steps == 1 else 's'}"
        if shape.rounds_per_step > 1:
            optimizer = f"an optimizer step every {shape.rounds_per_step} rounds"
        return f"{shape.images_per_round} images, {shape.backward_batches} backward batches per process, {optimizer}"

    def _passes(self) -> str:
        shape = self.shape
        if shape.tasks_per_round == 1:
            return ""
        if not shape.tasks_per_pass:
            return "as many tasks as fit into memory: known at the start, when the model is here"
        passes = math.ceil(shape.tasks_per_round / shape.tasks_per_pass)
        images = shape.tasks_per_pass * shape.backward_size
        tasks, rows = _count(shape.tasks_per_pass, "task"), _count(images, "image")
        return f"{tasks}, {rows} in a pass, {_count(passes, 'pass', 'es')} for all tasks"

    def _images(self) -> str:
        values, precision = self.values, self.values["mixed_precision"].replace("no", "float32")
        return f"{values['resolution']} pixels, prompts of at most {values['max_sequence_length']} tokens, {precision}"

    def _steps(self) -> str:
        sampler, drawn = self.sampler, len(self.algorithm.steps(self, (0, 0, 0)))
        text = f"{sampler.trained_steps} of {sampler.num_steps} trained"
        text += f", {drawn} of them supervised in each rollout" if drawn < sampler.trained_steps else ""
        text += "" if sampler.schedule == FAMILY else f", noise levels {sampler.schedule}"
        if sampler.multistep:
            return f"{text}, rollouts by a second-order ODE solver, compared by Euler steps"
        noise = "" if sampler.kernel == "ode" else f" with noise level {sampler.noise_level:g}"
        return f"{text}, kernel {sampler.kernel}{noise}"

    def _rate(self) -> str:
        optimization, steps = self.read(OptimizerSettings), self.steps_after(self.shape.num_rounds)
        text, warmup = f"{optimization.learning_rate:g}, {optimization.lr_scheduler}", optimization.lr_warmup_steps
        text += f" over {steps} optimizer steps" if optimization.lr_scheduler != "constant" else ""
        return text + (f", the first {warmup} rising" if warmup else "")

    def _average(self) -> str:
        average = self.read(EmaSettings)
        times = f", {repeats} times" if (repeats := ema_repeats(self.values)) > 1 else ""
        every = f"every {average.ema_interval} optimizer steps" if average.ema_interval > 1 else "every optimizer step"
        return f"keeps up to {average.ema_decay:g} of itself{times} {every}" if average.ema else ""

    def _evaluations(self) -> str:
        names = ", ".join(self.watch.eval_variants)
        also = f", each also as {names}" if names else ""
        if not self.watch.eval_freq:
            return ""
        images = f"{sum(self.num_evaluated) or 'all'} images, {self.evaluation_nfe or 'unknown'} NFE"
        how = f"{self.watch.eval_num_steps} steps, guidance {self.watch.eval_guidance_scale:g}"
        return f"at the start and every {self.watch.eval_freq} rounds{also}: {images}; by default {how}"

    def _teacher_model(self, model: TeacherModel) -> str:
        parameters, others = model.size()
        size = (parameters + others) * DTYPES[self.values["mixed_precision"]].itemsize
        waits = ", on the host while it is not asked" if self.values["teacher_device"] else ""
        return f"{model.model}, {parameters / 1e9:.3g} B parameters, {size / 1e9:.3g} GB{waits}"

    def _source(self, task: Task) -> str:
        if not self.algorithm.has_rewards:
            return self._teacher(task)
        weight = self.values["train.distill_weight"]
        also = f", and {weight:g} times the distillation from {self._teacher(task)}" if self.teachers else ""
        return self._rewards(task) + also

    def _rewards(self, task: Task) -> str:
        parts = ", ".join(f"{weight:g} {name}" for name, weight in task.proxy_reward.items())
        return f"{self.algorithm.name} on the mean of {parts}"

    def _teacher(self, task: Task) -> str:
        target, scale = "", "" if task.scale == 1.0 else f" times {task.scale:g}"
        if task.strength != 1.0:
            start = with_origin(task.reference) if task.reference_adapter else "the base"
            target = f", target {task.strength:g} times the way to it from {start}"
        parts = [with_origin(task.lora_path)] if task.has_lora else []
        parts += [with_origin(task.model)] if task.model else []
        return f"teacher {' on '.join(parts)}{scale}, guidance {_guidance(task.guidance_scale)}{target}"


_VISITS = {
    TOGETHER: "each with one visit of every task",
    ALTERNATE: "each with one task, in turn",
    CASCADE: "each with one task, one after another",
}


def _count(number: int, what: str, plural: str = "s") -> str:
    return f"{number} {what}{'' if number == 1 else plural}"


def _guidance(scale: float) -> str:
    return "none (1.0)" if scale == 1.0 else f"{scale:g}"
