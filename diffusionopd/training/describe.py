"""The plan of a run, told to people."""

from __future__ import annotations

import math

from diffusionopd.algorithms.optim import EmaSettings, OptimizerSettings
from diffusionopd.config_schema import unset
from diffusionopd.config_schema.paths import with_origin
from diffusionopd.data.rounds import ALTERNATE, CASCADE, TOGETHER
from diffusionopd.data.tasks import Task, loss_weights
from diffusionopd.models.loading import DTYPES
from diffusionopd.models.schedules import FAMILY
from diffusionopd.models.teacher_models import TeacherModel
from diffusionopd.training.keys import ema_repeats
from diffusionopd.training.plan import Plan

_VISITS = {
    TOGETHER: "each with one visit of every task",
    ALTERNATE: "each with one task, in turn",
    CASCADE: "each with one task, one after another",
}


def describe(plan: Plan) -> str:
    """The plan of a run as a table for people, without a trailing newline."""
    shape, nfe = plan.shape, plan.nfe_per_round
    batches = f"{shape.batches_per_task} batch{'' if shape.batches_per_task == 1 else 'es'} per process"
    visits = f"each with {shape.drawn} drawn tasks" if shape.drawn else _VISITS[shape.task_order]
    average = " on average" if len(plan.algorithm.steps(plan, (0, 0, 0))) < plan.sampler.trained_steps else ""
    rows = [
        ("model", with_origin(plan.values["pretrained.model"])),
        ("written to", str(plan.run.run_dir)),
        ("rounds", f"{shape.num_rounds}, {visits}"),
        ("processes", f"{shape.num_processes}, {shape.batch_size} images per batch in each"),
        ("per round", _round(plan)),
        ("per task", f"{shape.images_per_task} images of {shape.groups_per_task} prompts, in {batches}"),
        ("side by side", _passes(plan)),
        ("blocks", "compiled: the first round takes minutes longer" if plan.values["compile"] else ""),
        ("images", _images(plan)),
        ("sampler steps", _steps(plan)),
        ("student guidance", _guidance(plan.sampler.guidance)),
        ("learning rate", _rate(plan)),
        ("average", _average(plan)),
        ("student NFE", f"{nfe.student} per round, with gradient"),
        ("teacher NFE", nfe.teacher and f"{nfe.teacher} per round"),
        ("sampling NFE", nfe.sampling and f"{nfe.sampling} per round{average}"),
        ("base NFE", nfe.base and f"{nfe.base} per round, for train.beta and the references of targets"),
        ("evaluations", _evaluations(plan)),
    ]
    for task, prompts, weight in zip(plan.tasks, plan.num_prompts, loss_weights(plan.tasks), strict=True):
        rounds = prompts / shape.groups_per_task * (shape.num_tasks / shape.tasks_per_round)
        folders = f" in {len(task.folders)} folders" if len(task.folders) > 1 else ""
        rows += [(f"task {task.name}", f"{prompts} prompts{folders}, as many as {rounds:g} rounds draw")]
        rows += [("", _source(plan, task) + (f", its loss times {weight:g}" if weight != 1.0 else ""))]
    rows += [("teacher model", _teacher_model(plan, model)) for model in plan.teacher_models.values()]
    if not unset(start := plan.values["train.lora_path"]):
        rows += [("student", f"starts from {with_origin(start)}")]
    rows = [(name, value) for name, value in rows if value]
    width = max(len(name) for name, _ in rows)
    return "\n".join([f"{name:<{width}}  {value}" for name, value in rows] + [f"note: {n}" for n in plan.notes])


def _round(plan: Plan) -> str:
    shape = plan.shape
    steps = shape.backward_batches // shape.batches_per_step
    optimizer = f"{steps} optimizer step{'' if steps == 1 else 's'}"
    if shape.rounds_per_step > 1:
        optimizer = f"an optimizer step every {shape.rounds_per_step} rounds"
    return f"{shape.images_per_round} images, {shape.backward_batches} backward batches per process, {optimizer}"


def _passes(plan: Plan) -> str:
    shape = plan.shape
    if shape.tasks_per_round == 1:
        return ""
    if not shape.tasks_per_pass:
        return "as many tasks as fit into memory: known at the start, when the model is here"
    passes = math.ceil(shape.tasks_per_round / shape.tasks_per_pass)
    images = shape.tasks_per_pass * shape.backward_size
    tasks, rows = _count(shape.tasks_per_pass, "task"), _count(images, "image")
    return f"{tasks}, {rows} in a pass, {_count(passes, 'pass', 'es')} for all tasks"


def _images(plan: Plan) -> str:
    values, precision = plan.values, plan.values["mixed_precision"].replace("no", "float32")
    return f"{values['resolution']} pixels, prompts of at most {values['max_sequence_length']} tokens, {precision}"


def _steps(plan: Plan) -> str:
    sampler, drawn = plan.sampler, len(plan.algorithm.steps(plan, (0, 0, 0)))
    text = f"{sampler.trained_steps} of {sampler.num_steps} trained"
    text += f", {drawn} of them supervised in each rollout" if drawn < sampler.trained_steps else ""
    text += "" if sampler.schedule == FAMILY else f", noise levels {sampler.schedule}"
    if sampler.multistep:
        return f"{text}, rollouts by a second-order ODE solver, compared by Euler steps"
    noise = "" if sampler.kernel == "ode" else f" with noise level {sampler.noise_level:g}"
    return f"{text}, kernel {sampler.kernel}{noise}"


def _rate(plan: Plan) -> str:
    optimization, steps = plan.read(OptimizerSettings), plan.steps_after(plan.shape.num_rounds)
    text, warmup = f"{optimization.learning_rate:g}, {optimization.lr_scheduler}", optimization.lr_warmup_steps
    text += f" over {steps} optimizer steps" if optimization.lr_scheduler != "constant" else ""
    return text + (f", the first {warmup} rising" if warmup else "")


def _average(plan: Plan) -> str:
    average = plan.read(EmaSettings)
    times = f", {repeats} times" if (repeats := ema_repeats(plan.values)) > 1 else ""
    every = f"every {average.ema_interval} optimizer steps" if average.ema_interval > 1 else "every optimizer step"
    return f"keeps up to {average.ema_decay:g} of itself{times} {every}" if average.ema else ""


def _evaluations(plan: Plan) -> str:
    names = ", ".join(plan.watch.eval_variants)
    also = f", each also as {names}" if names else ""
    if not plan.watch.eval_freq:
        return ""
    images = f"{sum(plan.num_evaluated) or 'all'} images, {plan.evaluation_nfe or 'unknown'} NFE"
    how = f"{plan.watch.eval_num_steps} steps, guidance {plan.watch.eval_guidance_scale:g}"
    return f"at the start and every {plan.watch.eval_freq} rounds{also}: {images}; by default {how}"


def _teacher_model(plan: Plan, model: TeacherModel) -> str:
    parameters, others = model.size()
    size = (parameters + others) * DTYPES[plan.values["mixed_precision"]].itemsize
    waits = ", on the host while it is not asked" if plan.values["teacher_device"] else ""
    return f"{model.model}, {parameters / 1e9:.3g} B parameters, {size / 1e9:.3g} GB{waits}"


def _source(plan: Plan, task: Task) -> str:
    if not plan.algorithm.has_rewards:
        return _teacher(plan, task)
    weight = plan.values["train.distill_weight"]
    also = f", and {weight:g} times the distillation from {_teacher(plan, task)}" if plan.teachers else ""
    return _rewards(plan, task) + also


def _rewards(plan: Plan, task: Task) -> str:
    parts = ", ".join(f"{weight:g} {name}" for name, weight in task.proxy_reward.items())
    return f"{plan.algorithm.name} on the mean of {parts}"


def _teacher(plan: Plan, task: Task) -> str:
    target, scale = "", "" if task.scale == 1.0 else f" times {task.scale:g}"
    if task.strength != 1.0:
        start = with_origin(task.reference) if task.reference_adapter else "the base"
        target = f", target {task.strength:g} times the way to it from {start}"
    parts = [with_origin(task.lora_path)] if task.has_lora else []
    parts += [with_origin(task.model)] if task.model else []
    return f"teacher {' on '.join(parts)}{scale}, guidance {_guidance(task.guidance_scale)}{target}"


def _count(number: int, what: str, plural: str = "s") -> str:
    return f"{number} {what}{'' if number == 1 else plural}"


def _guidance(scale: float) -> str:
    return "none (1.0)" if scale == 1.0 else f"{scale:g}"
