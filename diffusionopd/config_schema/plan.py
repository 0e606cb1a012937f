"""How the keys relate: the batch arithmetic, the sampler, and the counts of a round that follow."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from diffusionopd.config_schema.geometry import tasks_a_round
from diffusionopd.config_schema.problems import Problems
from diffusionopd.config_schema.sources import TeacherSpec, run_folder, with_origin
from diffusionopd.config_schema.values import NOISY_KERNELS, ODE_SOLVERS, REWARD_ALGORITHMS, to_plain, unused_keys


@dataclass(frozen=True)
class RunPlan:
    """A checked configuration and the counts that follow from it. Per round and over all processes unless said."""

    teachers: tuple[TeacherSpec, ...]
    num_processes: int
    num_rounds: int
    batch_size: int  # pictures per process in a batch
    batches_per_task: int  # batches per process
    images_per_task: int
    images_per_round: int
    groups_per_task: int  # prompts, each with num_image_per_prompt pictures
    num_steps: int
    trained_steps: int
    steps_per_rollout: int  # supervised ones among them; 0: all
    kernel: str  # name in diffusionopd.transitions
    noise_level: float
    multistep: bool  # rollouts by a second-order ODE solver
    student_guidance: float  # 1.0 without classifier-free guidance
    student_evaluations: int  # transformer evaluations of single pictures
    teacher_evaluations: int
    sampling_evaluations: int  # of the student, without gradient; the expectation where the steps are drawn
    base_evaluations: int  # for train.beta
    backward_batches: int  # per process and round
    accumulation: int  # of them before an optimizer step: those of a part of a round, of a round, or of several
    algorithm: str
    task_order: str
    model: str
    run_dir: Path
    reward_options: dict[str, dict[str, Any]]  # reward -> keyword arguments of its scorer
    num_prompts: tuple[int, ...]  # training prompts of each task
    notes: tuple[str, ...]  # settings that are accepted but change nothing

    @property
    def from_rewards(self) -> bool:
        """Whether there are no teachers: the tasks' rewards are trained on."""
        return self.algorithm in REWARD_ALGORITHMS

    @property
    def batches_per_step(self) -> int:
        """Backward batches of a process in a round before its gradient is averaged."""
        return min(self.accumulation, self.backward_batches)

    @property
    def rounds_per_step(self) -> int:
        """Rounds before an optimizer step; 1 also where a round has several."""
        return max(1, self.accumulation // self.backward_batches)

    def updates_after(self, completed: int) -> int | None:
        """How many rounds, counting those that share a step as one, are complete; None between steps."""
        updates, more = divmod(completed, self.rounds_per_step)
        return None if more else updates

    def tasks_of(self, index: int) -> range:
        """Which tasks round ``index`` (from 0) visits."""
        count = len(self.teachers)
        if self.task_order == "together":
            return range(count)
        task = index % count if self.task_order == "alternate" else index * count // self.num_rounds
        return range(task, task + 1)

    def rounds_of(self, task: int, start: int = 0) -> range:
        """The rounds from ``start`` that visit a task."""
        count = len(self.teachers)
        if self.task_order == "together":
            return range(start, self.num_rounds)
        if self.task_order == "alternate":
            return range(start + (task - start) % count, self.num_rounds, count)
        first, end = (-(-part * self.num_rounds // count) for part in (task, task + 1))
        return range(max(start, first), end)

    def describe(self) -> str:
        """The plan as a table for people, without a trailing newline."""
        rows = [
            ("model", with_origin(self.model)),
            ("written to", str(self.run_dir)),
            ("rounds", f"{self.num_rounds}, {_VISITS[self.task_order]}"),
            ("processes", f"{self.num_processes}, {self.batch_size} pictures a batch in each"),
            ("a round", self._round()),
            ("a task", f"{self.images_per_task} pictures of {self.groups_per_task} prompts, in {self._batches()}"),
            ("steps", f"{self.trained_steps} of {self.num_steps} trained{self._drawn()}, {self._sampler()}"),
            ("student guidance", _guidance(self.student_guidance)),
            ("student evaluations", f"{self.student_evaluations} of the transformer a round, with gradient"),
        ]
        if self.teacher_evaluations:
            rows.append(("teacher evaluations", f"{self.teacher_evaluations} of the transformer a round"))
        if self.sampling_evaluations:
            average = " on average" if self.steps_per_rollout else ""
            rows.append(("sampling evaluations", f"{self.sampling_evaluations} of the transformer a round{average}"))
        if self.base_evaluations:
            rows.append(("base evaluations", f"{self.base_evaluations} of the transformer a round, for train.beta"))
        for teacher, prompts in zip(self.teachers, self.num_prompts, strict=True):
            rounds = prompts / self.groups_per_task
            rows.append((f"task {teacher.name}", f"{prompts} prompts, all seen every {rounds:g} rounds"))
            rows.append(("", self._teacher(teacher)))
        width = max(len(name) for name, _ in rows)
        return "\n".join([f"{name:<{width}}  {value}" for name, value in rows] + [f"note: {n}" for n in self.notes])

    def _round(self) -> str:
        steps = self.backward_batches // self.batches_per_step
        optimizer = f"{steps} optimizer step{'' if steps == 1 else 's'}"
        if self.rounds_per_step > 1:
            optimizer = f"an optimizer step every {self.rounds_per_step} rounds"
        return f"{self.images_per_round} pictures, {self.backward_batches} backward batches a process, {optimizer}"

    def _teacher(self, task: TeacherSpec) -> str:
        if self.from_rewards:
            parts = ", ".join(f"{weight:g} {name}" for name, weight in task.proxy_reward.items())
            return f"{self.algorithm} on the mean of {parts}"
        return f"teacher {with_origin(task.lora_path)}, guidance {_guidance(task.guidance_scale)}"

    def _batches(self) -> str:
        return f"{self.batches_per_task} batch{'' if self.batches_per_task == 1 else 'es'} a process"

    def _drawn(self) -> str:
        return f", {self.steps_per_rollout} of them supervised in each rollout" if self.steps_per_rollout else ""

    def _sampler(self) -> str:
        if self.multistep:
            return "rollouts by a second-order ODE solver, compared by Euler steps"
        return f"kernel {self.kernel}" + (f" with noise level {self.noise_level:g}" if self.kernel != "ode" else "")


_VISITS = {
    "together": "each with one visit of every task",
    "alternate": "each with one task, in turn",
    "cascade": "each with one task, one after another",
}


def check_batches(values: dict[str, Any], num_processes: int, problems: Problems) -> None:
    """Batch arithmetic: everything that must divide something else. Raises ValueError for no process at all."""
    if num_processes < 1:
        raise ValueError(f"num_processes is {num_processes}; it must be at least 1")
    if problems.good("resolution") and values["resolution"] % 16:
        near = round(values["resolution"] / 16) * 16
        problems.add("resolution", f"is {values['resolution']}", f"It must be a multiple of 16, such as {near}.")
    batches, tasks = "sample.num_batches_per_epoch", "train.teachers"
    together = values.get("train.task_order") == "together"
    if together and problems.good(batches, tasks) and values[tasks] and values[batches] % len(values[tasks]):
        up = math.ceil(values[batches] / len(values[tasks])) * len(values[tasks])
        what = f"is {values[batches]}, not a multiple of the {len(values[tasks])} teachers"
        problems.add(batches, what, f"Set it to {up} (and train.gradient_accumulation_steps to match).")
    batch, group = "sample.train_batch_size", "sample.num_image_per_prompt"
    if problems.good(batch, group, batches, tasks):
        pictures = values[batches] // tasks_a_round(values) * values[batch] * num_processes
        if pictures % values[group]:
            what = f"is {values[group]}, which does not divide the {pictures} pictures of a task in a round"
            problems.add(group, what, f"Choose a divisor of {pictures}.")
    part, steps = "train.batch_size", "train.gradient_accumulation_steps"
    if problems.good(batch, part) and values[batch] % values[part]:
        what = f"is {values[part]}, which does not divide sample.train_batch_size {values[batch]}"
        problems.add(part, what, f"Choose a divisor of {values[batch]}.")
    elif problems.good(batch, part, steps, batches):
        right = values[batches] * values[batch] // values[part]
        distilled = values.get("train.algorithm") == "opd"
        several = "a multiple of it for a step every several rounds"
        if not distilled and right % values[steps] and values[steps] % right:
            what = f"is {values[steps]}, which does not divide the {right} backward batches of a round"
            problems.add(steps, what, f"Choose a divisor of {right}, or {several}.")
        if distilled and values[steps] % right:
            what = f"is {values[steps]}, but one optimizer step a round needs {right}"
            arithmetic = f"{values[batches]} batches x {values[batch]} pictures / {values[part]}"
            problems.add(steps, what, f"Set it to {right} ({arithmetic}), or {several}.")
        epochs = "train.num_inner_epochs"
        if values[steps] > right and problems.good(epochs) and values[epochs] > 1:
            what = f"is {values[epochs]}, but with an optimizer step every several rounds all passes would be the same"
            problems.add(epochs, what, f"Set it to 1, or {steps} to {right}.")


def check_sampler(values: dict[str, Any], problems: Problems) -> None:
    """Steps, noise and loss must go together."""
    steps, fraction = "sample.num_steps", "train.timestep_fraction"
    if problems.good(steps, fraction) and int(values[steps] * values[fraction]) < 1:
        what = f"is {values[fraction]}, which trains none of {values[steps]} steps"
        problems.add(fraction, what, f"Set it to at least {1 / values[steps]:.3g}.")
    elif problems.good(steps, fraction, "train.steps_per_rollout"):
        chosen, trained = values["train.steps_per_rollout"], int(values[steps] * values[fraction])
        if chosen > trained and values.get("train.algorithm") == "opd":
            remedy = f"Set it to at most {trained}, or to 0 for all of them."
            problems.add("train.steps_per_rollout", f"is {chosen}, more than the {trained} trained steps", remedy)
    solver, noise = "sample.solver", "sample.noise_level"
    if not problems.good(solver, noise, "sample.deterministic"):
        return
    if values[solver] in ("cps", "ddim") and values[noise] > 1:
        problems.add(noise, f"is {values[noise]}", f"Solver {values[solver]!r} takes at most 1.")
    kernel, _ = _kernel(values[solver], values[noise], values["sample.deterministic"])
    algorithm = values.get("train.algorithm")
    if algorithm in ("grpo", "grpo_guard") and kernel == "ode":
        remedy = "Use solver flow, dance, cps or ddim with noise_level above 0 and deterministic False."
        problems.add("train.algorithm", f"is {algorithm!r}, which needs a sampler with noise", remedy)
    if algorithm in REWARD_ALGORITHMS and problems.good("sample.num_image_per_prompt"):
        if values["sample.num_image_per_prompt"] == 1 and values.get("per_prompt_stat_tracking") is True:
            remedy = "Set it to at least 2, such as 8: advantages compare the pictures of one prompt."
            problems.add("sample.num_image_per_prompt", "is 1", remedy)
    if (
        algorithm == "opd"
        and problems.good("train.loss")
        and values["train.loss"] == "policy_gradient"
        and kernel == "ode"
    ):
        remedy = "Use solver flow, dance, cps or ddim with noise_level above 0 and deterministic False."
        problems.add("train.loss", "is 'policy_gradient', which needs a sampler with noise", remedy)


def check_patience(values: dict[str, Any], num_processes: int, problems: Problems) -> None:
    """Processes must wait for each other longer than one of them may wait for a reward that is trained on."""
    scoring, meeting = "reward_timeout", "collective_timeout"
    if num_processes == 1 or values.get("train.algorithm") not in REWARD_ALGORITHMS:
        return
    if problems.good(scoring, meeting) and values[scoring] >= values[meeting]:
        what = f"is {values[scoring]:g} seconds, not below the {values[meeting]:g} of {meeting}"
        remedy = f"While one process waits for a reward the others wait for it: raise {meeting} above it, or lower it."
        problems.add(scoring, what, remedy)


def _kernel(solver: str, noise_level: float, deterministic: bool) -> tuple[str, float]:
    """Kernel and noise level of the transitions; without noise every solver's step is compared as an Euler step."""
    if solver in ODE_SOLVERS or deterministic or noise_level == 0:
        return "ode", 0.0
    return NOISY_KERNELS[solver], float(noise_level)


def make_plan(
    config: ConfigDict,
    teachers: tuple[TeacherSpec, ...],
    num_prompts: tuple[int, ...],
    num_processes: int,
    notes: tuple[str, ...],
) -> RunPlan:
    """The counts that follow from a configuration in which nothing is wrong."""
    sample, train = config.sample, config.train
    kernel, noise_level = _kernel(sample.solver, sample.noise_level, sample.deterministic)
    visited = len(teachers) if train.task_order == "together" else 1
    batches_per_task = sample.num_batches_per_epoch // visited
    images_per_task = batches_per_task * sample.train_batch_size * num_processes
    trained_steps = int(sample.num_steps * train.timestep_fraction)
    chosen = train.steps_per_rollout if train.algorithm == "opd" else 0
    student_guidance = float(sample.guidance_scale) if train.cfg else 1.0
    visits = images_per_task * (chosen or trained_steps)
    student_evaluations = visits * visited * _passes(student_guidance) * train.num_inner_epochs
    pictures = images_per_task * sample.num_steps * visited
    teacher_passes = sum(_passes(teacher.guidance_scale) for teacher in teachers) * visited / len(teachers)
    from_rewards = train.algorithm in REWARD_ALGORITHMS
    old_policy = student_evaluations if train.algorithm == "nft" else 0
    if from_rewards:
        sampling = pictures * _passes(student_guidance) + old_policy
    else:
        sampling = round(images_per_task * visited * _passes(student_guidance) * _unsupervised(trained_steps, chosen))
    return RunPlan(
        teachers=teachers,
        num_processes=num_processes,
        num_rounds=config.num_epochs,
        batch_size=sample.train_batch_size,
        batches_per_task=batches_per_task,
        images_per_task=images_per_task,
        images_per_round=images_per_task * visited,
        groups_per_task=images_per_task // sample.num_image_per_prompt,
        num_steps=sample.num_steps,
        trained_steps=trained_steps,
        steps_per_rollout=chosen,
        kernel=kernel,
        noise_level=noise_level,
        multistep=sample.solver == "dpm2",
        student_guidance=student_guidance,
        student_evaluations=student_evaluations,
        teacher_evaluations={
            "opd": round(visits * teacher_passes),
            "sft": round(images_per_task * sample.num_steps * teacher_passes),
        }.get(train.algorithm, 0),
        sampling_evaluations=sampling,
        base_evaluations=student_evaluations if train.beta > 0 and train.algorithm != "sft" else 0,
        backward_batches=sample.num_batches_per_epoch * sample.train_batch_size // train.batch_size,
        accumulation=train.gradient_accumulation_steps,
        algorithm=train.algorithm,
        task_order=train.task_order,
        model=config.pretrained.model,
        run_dir=run_folder(config.save_dir, config.logdir, config.run_name),
        reward_options=to_plain(config.reward_options),
        num_prompts=num_prompts,
        notes=notes,
    )


def _unsupervised(trained_steps: int, chosen: int) -> float:
    """Steps of a rollout before the last of ``chosen`` drawn ones and not among them, in expectation.

    The largest of k numbers drawn from 1 to T without replacement is k (T + 1) / (k + 1) on average.
    """
    return chosen * (trained_steps + 1) / (chosen + 1) - chosen


def _passes(guidance_scale: float) -> int:
    """Transformer passes of one guided evaluation: a prompt alone, or with its unconditional counterpart."""
    return 1 if guidance_scale == 1.0 else 2


def _guidance(scale: float) -> str:
    return "none (1.0)" if scale == 1.0 else f"{scale:g}"


def notes(values: dict[str, Any], defaults: dict[str, Any]) -> tuple[str, ...]:
    """What was set and does nothing."""
    notes = []
    algorithm = values["train.algorithm"]
    unused = sorted(key for key in unused_keys(algorithm) if _plain(values[key]) != _plain(defaults[key]))
    if unused:
        what = "distillation" if algorithm == "opd" else algorithm
        notes.append(f"without effect on {what}: {', '.join(unused)}")
    batches = values["sample.num_batches_per_epoch"] * values["sample.train_batch_size"] // values["train.batch_size"]
    if rest := values["num_epochs"] % max(1, values["train.gradient_accumulation_steps"] // batches):
        notes.append(f"the last {rest} of num_epochs {values['num_epochs']} rounds end in no optimizer step")
    solver, noise = values["sample.solver"], values["sample.noise_level"]
    if noise > 0 and (solver in ODE_SOLVERS or values["sample.deterministic"]):
        why = f"solver {solver} adds none" if solver in ODE_SOLVERS else "sample.deterministic is True"
        notes.append(f"sample.noise_level {noise:g} is ignored: {why}")
    if algorithm == "opd" and values["train.loss"] == "policy_gradient":
        ignored = [key for key in ("train.target", "train.self_normalize") if values[key] != defaults[key]]
        notes.extend(f"{key} is ignored: train.loss is policy_gradient" for key in ignored)
    return tuple(notes)


def _plain(value: Any) -> Any:
    """``value`` for comparison: a tuple and a list with the same items are the same setting, None is unset."""
    if isinstance(value, list | tuple):
        return list(value)
    return "" if value is None else value
