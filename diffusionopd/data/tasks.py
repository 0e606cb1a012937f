"""The tasks of a run: their prompts, teachers and rewards."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from diffusionopd.config_schema import FREE, READ, REWARDS, TEACHERS, Problems, is_number, key, keys_of, nearest, unset
from diffusionopd.config_schema.paths import check_adapter, gap
from diffusionopd.data.prompts import FORMATS, PromptError, listed, load_prompts, prompt_file, with_trigger
from diffusionopd.data.unfit import unfit_lines
from diffusionopd.files import looked_in


def _are_texts(values: Any) -> bool:
    return all(isinstance(value, str) for value in values)


def is_name(value: Any) -> bool:
    """Whether it can be part of a metric's or a file's name."""
    return isinstance(value, str) and re.fullmatch(r"[\w-]+", value) is not None


@dataclass(frozen=True)
class Task:
    """An entry of ``train.teachers``: one task, with its teacher or the rewards it is trained on."""

    name: str = key("name", "", form=('made of letters, digits, "-", "_"', is_name))
    """Of the task, in logs and files."""
    dataset: str = key("dataset", "", path=READ)
    """Folder with the prompts: {train,test}.txt or {train,test}_metadata.jsonl. Or one file of training prompts, where
    nothing is evaluated (`eval_freq` 0)."""
    datasets: tuple = key("datasets", [], path=READ, form=("a list of folders", _are_texts))
    """In the place of `dataset`: several such folders of different names. The task's prompts are those of all together,
    so each prompt of each is drawn equally often. Evaluations log the mean over all test prompts, and that of each
    folder's as `eval/<task>/<folder>/<reward>`."""
    trigger: str = key("trigger", "")
    """What calls the teacher's LoRA, such as "sks style": in the place of `{trigger}` in the prompts, and in front of
    those without it, "sks style, a red fox". With `{prompt}` in it, around them: "{prompt}, sks style"."""
    lora_path: str = key("lora_path", "", path=READ, resume=TEACHERS)
    """The teacher: a local folder, which may be that of a run (its latest checkpoint), a LoRA file, or a place on the
    hub ("owner/name[/folder or file][@revision]"); docs/loras.md has the formats. Without effect when the training is
    from rewards alone (`train.distill_weight`)."""
    model: str = key("model", "", path=READ, resume=TEACHERS)
    """A teacher that is no LoRA of the student's base: a transformer of the same family fine-tuned in full, or a larger
    one, as diffusers pipeline folder, transformer folder, single .safetensors file or hub id. It sees the base's
    latents and text embeddings, which must be its own too (checked; its VAE and text encoders are not loaded).
    `lora_path` may then be empty, or is a LoRA on this model. Tasks with the same `model` share it; `teacher_device`
    says where it is. `strength` still counts from the student's base."""
    scale: float = key(
        "scale", 1.0, form=("a finite number other than 0", lambda v: is_number(v) and v != 0), resume=TEACHERS
    )
    """Multiplies the teacher's LoRA, as the strength slider of other tools does; below 0 it teaches the opposite."""
    proxy_reward: dict[str, float] = key("proxy_reward", {}, resume=REWARDS)
    """{reward: weight} to monitor (`monitor_freq`) and evaluate (`eval_freq`) with; {} for none. Training from rewards
    maximises their weighted mean."""
    prompt_fn: str = key("prompt_fn", "", choices=tuple(FORMATS))
    """One of "general_ocr" reads the .txt files, one prompt per line; "geneval" reads the .jsonl files."""
    guidance_scale: float = key("guidance_scale", 4.5, "[1, inf)", resume=TEACHERS)
    """Classifier-free guidance of this teacher; optional (`sample.teacher_guidance_scale`)."""
    strength: float = key("strength", 1.0, "[0, inf)", resume=TEACHERS)
    """How far the target is from the reference, in units of the way to the teacher: 1 is the teacher itself, less is
    softened, more is beyond it. Anything but 1 costs one more forward without gradient per trained state."""
    reference: str = key("reference", "", path=READ, resume=TEACHERS)
    """What `strength` counts from, under this teacher's guidance: empty for the base without adapters, or a LoRA, given
    as `lora_path` is."""
    weight: float = key("weight", 1.0, "(0, inf)")
    """Of this task's loss, relative to the mean of all tasks' weights; logged losses are without it. AdamW hardly sees
    a factor that a whole optimizer step has in common, so it acts where tasks share steps (not with
    `train.task_order` "alternate" or "cascade", unless rounds share a step)."""
    eval_guidance_scale: float = key("eval_guidance_scale", 4.5, "[1, inf)", resume=FREE)
    """Guidance of the student in evaluations on this task; optional (`sample.eval_guidance_scale`)."""
    eval_num_steps: int = key("eval_num_steps", 40, "[1, inf)", resume=FREE)
    """Sampler steps in evaluations on this task; optional (`sample.eval_num_steps`)."""

    @property
    def adapter(self) -> str:
        """The teacher's adapter."""
        return "teacher_" + self.name

    @property
    def has_lora(self) -> bool:
        """Whether the teacher is a LoRA, on the base or on its own model; else it is that model itself."""
        return not (self.model and unset(self.lora_path))

    @property
    def reference_adapter(self) -> str | None:
        """The reference's adapter; None where it is the base."""
        return None if unset(self.reference) else "reference_" + self.name

    @property
    def folders(self) -> tuple[str, ...]:
        """Where its prompts are."""
        return tuple(self.datasets) or (self.dataset,)


def loss_weights(tasks: Sequence[Task]) -> list[float]:
    """The tasks' weights, relative to their mean: exactly 1 where all are equal."""
    weights = [Fraction(task.weight) for task in tasks]
    return [float(weight * len(weights) / sum(weights)) for weight in weights]


FIELDS = keys_of(Task)
_LORAS = ("the path of a table, or a list of dicts", lambda value: isinstance(value, str | list | tuple))


@dataclass(frozen=True)
class TaskSettings:
    """Tasks."""

    teachers: tuple = key("train.teachers", [])
    """The tasks: a list of dicts with the fields of the table below, each with its teacher."""
    teacher_guidance_scale: float = key("sample.teacher_guidance_scale", 4.5, "[1, inf)", from_model="guidance_scale")
    """Guidance of the teachers that have no `guidance_scale` of their own; 1.0 is without."""
    loras: Any = key("loras", None, optional=True, form=_LORAS, resume=FREE)
    """In the place of `train.teachers`: the LoRAs to merge, as the path of a table (CSV) or a list of dicts, each with
    `name`, `lora` and, where wanted, `scale`, `trigger`, `prompts`, `guidance_scale` (docs/merging.md). A task is made
    of each; `train.tasks_per_round` is lowered to their number, and `sample.num_batches_per_epoch` and
    `train.gradient_accumulation_steps` are raised to what makes a round of equal shares with one optimizer step."""


def check_tasks(
    values: Mapping[str, Any],
    problems: Problems,
    *,
    from_rewards: bool,
    with_teachers: bool,
    reward_names: Collection[str],
    defaults: Mapping[str, Any],
    with_test: bool,
    scored: Mapping[str, int | None],
) -> tuple[tuple[Task, ...], tuple[Counter[str], ...]]:
    """The tasks, and of each how many prompts it trains on and is evaluated on, by split; what is wrong with them goes
    to ``problems``.

    ``defaults``: what a task has that does not say so itself; ``with_test``: test prompts must be there too.
    ``scored``: split -> how many of its prompts, from the first, are scored; None for all.
    """
    where = "train.teachers"
    if not problems.good(where):
        return (), ()
    entries = values[where] or (single_task(values) if from_rewards else [])
    if not entries:
        remedy = "Give at least one task, or dataset, prompt_fn and reward_fn, as in config/teacher.py."
        if not from_rewards:
            remedy = "Give at least one teacher, as in config/opd.py, or a table of LoRAs in loras."
        problems.add(where, "is empty", remedy)
    tasks, prompts = [], []
    for index, entry in enumerate(entries):
        place = f"{where}[{index}]"
        if not isinstance(entry, Mapping):
            problems.add(place, f"is {entry!r}", f"It must be a dict with {', '.join(FIELDS)}.")
            continue
        given = {name: value for name, value in entry.items() if value is not None}
        fields = {name: declared.default for name, declared in FIELDS.items()} | dict(defaults) | given
        _check_fields(place, fields, problems, reward_names)
        if from_rewards and fields["proxy_reward"] == {}:
            problems.add(f"{place}.proxy_reward", "is empty", "Name the rewards to train on, {reward: weight}.")
        if not problems.good(f"{place}.model") or unset(fields["model"]):
            fields["model"] = ""
        if not with_teachers:
            fields["lora_path"] = fields["model"] = ""
        elif problems.good(f"{place}.lora_path"):
            _check_teacher(place, fields, problems)
            _check_target(place, fields, problems)
        options = values.get("reward_options", {}) if problems.good("reward_options") else {}
        evaluated = with_test and fields["proxy_reward"] != {}  # else there is nothing to score
        prompts.append(_check_dataset(place, fields, evaluated, scored, options, problems))
        tasks.append(Task(**{name: fields[name] for name in FIELDS}))
    for name, count in Counter(str(task.name) for task in tasks).items():
        if count > 1:
            problems.add(f"{where}[].name", f"is {name!r} for {count} teachers", "Names must differ.")
    return tuple(tasks), tuple(prompts)


def check_saved_tasks(entries: Any, problems: Problems) -> None:
    """The tasks of a run's config.json: fields that this version does not know are left alone."""
    for index, entry in enumerate(entries):
        place = f"train.teachers[{index}]"
        if isinstance(entry, Mapping):
            known = {name: value for name, value in entry.items() if name in FIELDS and value is not None}
            _check_fields(place, {"name": ""} | known, problems)
        else:
            problems.add(place, f"is {entry!r}", "It must be an object.")


def _check_fields(
    place: str, fields: Mapping[str, Any], problems: Problems, reward_names: Collection[str] | None = None
) -> None:
    """Names and values of a task's fields, whether or not the files that they name exist."""
    for name in sorted(fields.keys() - FIELDS.keys()):
        remedy = nearest(name, FIELDS).strip() or f"Fields are {', '.join(FIELDS)}."
        problems.add(f"{place}.{name}", "is not a field of a teacher", remedy)
    for name, declared in FIELDS.items():
        if name in fields and (problem := declared.problem(fields[name])):
            problems.add(f"{place}.{name}", *problem)
    rewards = f"{place}.proxy_reward"
    weights = fields.get("proxy_reward", {}) if problems.good(rewards) else {}
    if weights and not any(weights.values()):
        problems.add(rewards, "gives no reward a weight above 0", "Raise one, or leave the field out.")
    for name, weight in weights.items():
        if not is_number(weight) or weight < 0:
            problems.add(rewards, f"gives {name} the weight {weight!r}", "A weight must be a number of at least 0.")
        if reward_names is not None and name not in reward_names:
            remedy = nearest(str(name), reward_names).strip() or f"Known are {', '.join(sorted(reward_names))}."
            problems.add(rewards, f"names the unknown reward {name!r}", remedy)


def _check_teacher(place: str, fields: Mapping[str, Any], problems: Problems) -> None:
    """A teacher is a LoRA, or a model; what is at these places is not looked at."""
    if fields["model"] and unset(fields["lora_path"]):
        if problems.good(f"{place}.scale") and fields["scale"] != 1.0:
            what = f"is {fields['scale']:g}, but the teacher is a model without a LoRA, which has nothing to multiply"
            problems.add(f"{place}.scale", what, "Leave it at 1; strength moves the target.")
        return
    check_adapter(f"{place}.lora_path", fields["lora_path"], problems)


def _check_target(place: str, fields: Mapping[str, Any], problems: Problems) -> None:
    """A reference is there, and has a use."""
    reference = f"{place}.reference"
    if problems.good(reference) and not unset(fields["reference"]):
        check_adapter(reference, fields["reference"], problems)
        if fields["strength"] == 1.0:
            problems.add(reference, "has no effect at strength 1", "Set the strength, or leave the reference out.")


def single_task(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The task that the upstream keys of single-task reinforcement learning describe."""
    if not values.get("dataset"):
        return []
    name = re.sub(r"[^\w-]", "_", Path(str(values["dataset"])).name)
    fields = {"dataset": values["dataset"], "prompt_fn": values["prompt_fn"], "proxy_reward": values["reward_fn"]}
    return [{"name": name, **fields}]


def _check_dataset(
    place: str,
    fields: Mapping[str, Any],
    with_test: bool,
    scored: Mapping[str, int | None],
    options: Mapping[str, Any],
    problems: Problems,
) -> Counter[str]:
    """Check the prompt files of a task and return the numbers of prompts as of :func:`check_tasks`."""
    one, several = f"{place}.dataset", f"{place}.datasets"
    if not problems.good(one, several, f"{place}.prompt_fn", f"{place}.trigger"):
        return Counter()
    rewards = fields["proxy_reward"] if problems.good(f"{place}.proxy_reward") else {}
    checked = {"prompt_fn": fields["prompt_fn"], "with_test": with_test, "scored": scored, "rewards": rewards}
    checked |= {"trigger": fields["trigger"], "options": options}
    if not fields["datasets"]:
        return _check_folder(one, fields["dataset"], problems, **checked)
    if fields["dataset"]:
        problems.add(several, f"is set, and so is dataset, {fields['dataset']!r}", "Set one of them to None.")
    for name, count in Counter(Path(folder).name for folder in fields["datasets"]).items():
        if count > 1:
            problems.add(several, f"has {count} folders called {name!r}", "Evaluations name them so: rename one.")
    return sum((_check_folder(several, folder, problems, **checked) for folder in fields["datasets"]), Counter[str]())


def _check_folder(
    key: str,
    folder: str,
    problems: Problems,
    *,
    prompt_fn: str,
    with_test: bool,
    scored: Mapping[str, int | None],
    rewards: Mapping[str, float],
    options: Mapping[str, Any],
    trigger: str,
) -> Counter[str]:
    """Check the prompt files of a folder and return the numbers of prompts; where there are none, those asked for."""
    counts = Counter(test=scored.get("test") or 0 if with_test else 0)
    if what := gap(folder):
        problems.add(key, what, "Name the folder with the prompt files.")
        return counts
    for split in ("train", "test") if with_test else ("train",):
        file = prompt_file(folder, prompt_fn, split)
        if not file.is_file():
            what = f"lacks {file}{looked_in(file)}, which prompt_fn {prompt_fn!r} reads"
            problems.add(key, what, "dataset/README.md says where prompt files come from.")
            continue
        try:
            prompts = with_trigger(load_prompts(folder, prompt_fn, split), trigger)
        except PromptError as error:
            problems.add(key, f"has prompts that cannot be used: {error}", "")
            continue
        counts[split] = len(prompts if split == "train" else prompts[: scored[split]])
        if split in scored and (unfit := unfit_lines(prompts[: scored[split]], rewards, options)):
            problems.add(key, f"has {split} prompts that cannot be scored", f"{_UNFIT[split]}:\n{listed(unfit)}")
    return counts


_UNFIT = {
    "train": "Repair or remove these lines (a run that has begun is then resumed with --allow_config_change), or, in a "
    "distillation, do without scores (monitor_freq=0)",
    "test": "Repair or remove these lines, or do without evaluations (eval_freq=0)",
}
"""Split -> what to do about prompts of it that cannot be scored."""
