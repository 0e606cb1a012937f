"""How the keys relate: the batch arithmetic, the sampler, and the counts of a round that follow."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from diffusionopd.config_schema.problems import Problems
from diffusionopd.config_schema.sources import TeacherSpec, run_folder, with_origin
from diffusionopd.config_schema.values import NO_EFFECT, NOISY_KERNELS, ODE_SOLVERS, to_plain


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
    kernel: str  # name in diffusionopd.transitions
    noise_level: float
    multistep: bool  # rollouts by a second-order ODE solver
    student_guidance: float  # 1.0 without classifier-free guidance
    student_evaluations: int  # transformer evaluations of single pictures
    teacher_evaluations: int
    base_evaluations: int  # for train.beta
    backward_batches: int  # per process, before the one optimizer step
    model: str
    run_dir: Path
    reward_options: dict[str, dict[str, Any]]  # reward -> keyword arguments of its scorer
    num_prompts: tuple[int, ...]  # training prompts of each task
    notes: tuple[str, ...]  # settings that are accepted but change nothing

    def describe(self) -> str:
        """The plan as a table for people, without a trailing newline."""
        rows = [
            ("model", with_origin(self.model)),
            ("written to", str(self.run_dir)),
            ("rounds", f"{self.num_rounds}, each with one visit of every task"),
            ("processes", f"{self.num_processes}, {self.batch_size} pictures a batch in each"),
            ("a round", f"{self.images_per_round} pictures, {self.backward_batches} backward batches a process"),
            ("a task", f"{self.images_per_task} pictures of {self.groups_per_task} prompts, in {self._batches()}"),
            ("steps", f"{self.trained_steps} of {self.num_steps} trained, {self._sampler()}"),
            ("student guidance", _guidance(self.student_guidance)),
            ("student evaluations", f"{self.student_evaluations} of the transformer a round, with gradient"),
            ("teacher evaluations", f"{self.teacher_evaluations} of the transformer a round"),
        ]
        if self.base_evaluations:
            rows.append(("base evaluations", f"{self.base_evaluations} of the transformer a round, for train.beta"))
        for teacher, prompts in zip(self.teachers, self.num_prompts, strict=True):
            rounds = prompts / self.groups_per_task
            rows.append((f"task {teacher.name}", f"{prompts} prompts, all seen every {rounds:g} rounds"))
            rows.append(("", f"teacher {with_origin(teacher.lora_path)}, guidance {_guidance(teacher.guidance_scale)}"))
        width = max(len(name) for name, _ in rows)
        return "\n".join([f"{name:<{width}}  {value}" for name, value in rows] + [f"note: {n}" for n in self.notes])

    def _batches(self) -> str:
        return f"{self.batches_per_task} batch{'' if self.batches_per_task == 1 else 'es'} a process"

    def _sampler(self) -> str:
        if self.multistep:
            return "rollouts by a second-order ODE solver, compared by Euler steps"
        return f"kernel {self.kernel}" + (f" with noise level {self.noise_level:g}" if self.kernel != "ode" else "")


def check_batches(values: dict[str, Any], num_processes: int, problems: Problems) -> None:
    """Batch arithmetic: everything that must divide something else. Raises ValueError for no process at all."""
    if num_processes < 1:
        raise ValueError(f"num_processes is {num_processes}; it must be at least 1")
    if problems.good("resolution") and values["resolution"] % 16:
        near = round(values["resolution"] / 16) * 16
        problems.add("resolution", f"is {values['resolution']}", f"It must be a multiple of 16, such as {near}.")
    batches, tasks = "sample.num_batches_per_epoch", "train.teachers"
    if problems.good(batches, tasks) and values[batches] % len(values[tasks]):
        up = math.ceil(values[batches] / len(values[tasks])) * len(values[tasks])
        what = f"is {values[batches]}, not a multiple of the {len(values[tasks])} teachers"
        problems.add(batches, what, f"Set it to {up} (and train.gradient_accumulation_steps to match).")
    batch, group = "sample.train_batch_size", "sample.num_image_per_prompt"
    if problems.good(batch, group) and values[batch] * num_processes % values[group]:
        what = f"is {values[group]}, which does not divide {values[batch]} pictures x {num_processes} processes"
        problems.add(group, what, f"Choose a divisor of {values[batch] * num_processes}.")
    part, steps = "train.batch_size", "train.gradient_accumulation_steps"
    if problems.good(batch, part) and values[batch] % values[part]:
        what = f"is {values[part]}, which does not divide sample.train_batch_size {values[batch]}"
        problems.add(part, what, f"Choose a divisor of {values[batch]}.")
    elif problems.good(batch, part, steps, batches):
        right = values[batches] * values[batch] // values[part]
        if values[steps] != right:
            what = f"is {values[steps]}, but one optimizer step a round needs {right}"
            arithmetic = f"{values[batches]} batches x {values[batch]} pictures / {values[part]}"
            problems.add(steps, what, f"Set it to {right} ({arithmetic}).")


def check_sampler(values: dict[str, Any], problems: Problems) -> None:
    """Steps, noise and loss must go together."""
    steps, fraction = "sample.num_steps", "train.timestep_fraction"
    if problems.good(steps, fraction) and int(values[steps] * values[fraction]) < 1:
        what = f"is {values[fraction]}, which trains none of {values[steps]} steps"
        problems.add(fraction, what, f"Set it to at least {1 / values[steps]:.3g}.")
    solver, noise = "sample.solver", "sample.noise_level"
    if not problems.good(solver, noise, "sample.deterministic"):
        return
    if values[solver] in ("cps", "ddim") and values[noise] > 1:
        problems.add(noise, f"is {values[noise]}", f"Solver {values[solver]!r} takes at most 1.")
    kernel, _ = _kernel(values[solver], values[noise], values["sample.deterministic"])
    if problems.good("train.loss") and values["train.loss"] == "policy_gradient" and kernel == "ode":
        remedy = "Use solver flow, dance, cps or ddim with noise_level above 0 and deterministic False."
        problems.add("train.loss", "is 'policy_gradient', which needs a sampler with noise", remedy)


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
    batches_per_task = sample.num_batches_per_epoch // len(teachers)
    images_per_task = batches_per_task * sample.train_batch_size * num_processes
    trained_steps = int(sample.num_steps * train.timestep_fraction)
    student_guidance = float(sample.guidance_scale) if train.cfg else 1.0
    visits = images_per_task * trained_steps
    student_evaluations = visits * len(teachers) * _passes(student_guidance) * train.num_inner_epochs
    return RunPlan(
        teachers=teachers,
        num_processes=num_processes,
        num_rounds=config.num_epochs,
        batch_size=sample.train_batch_size,
        batches_per_task=batches_per_task,
        images_per_task=images_per_task,
        images_per_round=images_per_task * len(teachers),
        groups_per_task=images_per_task // sample.num_image_per_prompt,
        num_steps=sample.num_steps,
        trained_steps=trained_steps,
        kernel=kernel,
        noise_level=noise_level,
        multistep=sample.solver == "dpm2",
        student_guidance=student_guidance,
        student_evaluations=student_evaluations,
        teacher_evaluations=visits * sum(_passes(teacher.guidance_scale) for teacher in teachers),
        base_evaluations=student_evaluations if train.beta > 0 else 0,
        backward_batches=train.gradient_accumulation_steps,
        model=config.pretrained.model,
        run_dir=run_folder(config.save_dir, config.logdir, config.run_name),
        reward_options=to_plain(config.reward_options),
        num_prompts=num_prompts,
        notes=notes,
    )


def _passes(guidance_scale: float) -> int:
    """Transformer passes of one guided evaluation: a prompt alone, or with its unconditional counterpart."""
    return 1 if guidance_scale == 1.0 else 2


def _guidance(scale: float) -> str:
    return "none (1.0)" if scale == 1.0 else f"{scale:g}"


def notes(values: dict[str, Any], defaults: dict[str, Any]) -> tuple[str, ...]:
    """What was set and does nothing."""
    notes = []
    unused = sorted(key for key in NO_EFFECT if _plain(values[key]) != _plain(defaults[key]))
    if unused:
        notes.append(f"without effect on distillation: {', '.join(unused)}")
    solver, noise = values["sample.solver"], values["sample.noise_level"]
    if noise > 0 and (solver in ODE_SOLVERS or values["sample.deterministic"]):
        why = f"solver {solver} adds none" if solver in ODE_SOLVERS else "sample.deterministic is True"
        notes.append(f"sample.noise_level {noise:g} is ignored: {why}")
    if values["train.loss"] == "policy_gradient":
        ignored = [key for key in ("train.target", "train.self_normalize") if values[key] != defaults[key]]
        notes.extend(f"{key} is ignored: train.loss is policy_gradient" for key in ignored)
    return tuple(notes)


def _plain(value: Any) -> Any:
    """``value`` for comparison: a tuple and a list with the same items are the same setting, None is unset."""
    if isinstance(value, list | tuple):
        return list(value)
    return "" if value is None else value
