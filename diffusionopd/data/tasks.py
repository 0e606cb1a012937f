"""The tasks of a run: their prompts, teachers and rewards."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from diffusionopd.config_schema import FREE, REWARDS, TEACHERS, Problems, is_number, key, keys_of, nearest
from diffusionopd.config_schema.paths import check_adapter, gap
from diffusionopd.data.prompts import FORMATS


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_name(value: Any) -> bool:
    """Whether it can be part of a metric's or a file's name."""
    return isinstance(value, str) and re.fullmatch(r"[\w-]+", value) is not None


@dataclass(frozen=True)
class Task:
    """An entry of ``train.teachers``: one task, with its teacher or the rewards it is trained on."""

    name: str = key("name", "", form=('made of letters, digits, "-", "_"', is_name))
    """Of the task, in logs and files."""
    dataset: str = key("dataset", "")
    """Folder with the prompts: {train,test}.txt or {train,test}_metadata.jsonl."""
    datasets: tuple = key("datasets", [], form=("a list of folders", lambda value: all(map(_is_text, value))))
    """In the place of `dataset`: several such folders of different names. The task's prompts are those of all together,
    so each prompt of each is drawn equally often. Evaluations log the mean over all test prompts, and that of each
    folder's as `eval/<task>/<folder>/<reward>`."""
    lora_path: str = key("lora_path", "", resume=TEACHERS)
    """The teacher: a local folder, a .safetensors file, or a hub id with subfolder ("organisation/name/sub"). Without
    effect when the training is from rewards."""
    proxy_reward: dict[str, float] = key("proxy_reward", {}, resume=REWARDS)
    """{reward: weight} to monitor (`monitor_freq`) and evaluate (`eval_freq`) with; {} for none. Training from rewards
    maximises their weighted mean."""
    prompt_fn: str = key("prompt_fn", "", choices=tuple(FORMATS))
    """One of "general_ocr" reads the .txt files, one prompt per line; "geneval" reads the .jsonl files."""
    guidance_scale: float = key("guidance_scale", 4.5, "[1, inf)", resume=TEACHERS)
    """Classifier-free guidance of this teacher; optional (`sample.teacher_guidance_scale`)."""
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
        """The teacher's adapter: a task may be called anything, a module attribute may not."""
        return "teacher_" + "".join(c if c.isalnum() else "_" for c in self.name)

    @property
    def folders(self) -> tuple[str, ...]:
        """Where its prompts are."""
        return tuple(self.datasets) or (self.dataset,)


def loss_weights(tasks: Sequence[Task]) -> list[float]:
    """The tasks' weights, relative to their mean: exactly 1 where all are equal."""
    weights = [Fraction(task.weight) for task in tasks]
    return [float(weight * len(weights) / sum(weights)) for weight in weights]


FIELDS = keys_of(Task)


@dataclass(frozen=True)
class TaskSettings:
    """Tasks."""

    teachers: tuple = key("train.teachers", [])
    """The tasks: a list of dicts with the fields of the table below, each with its teacher."""
    teacher_guidance_scale: float = key("sample.teacher_guidance_scale", 4.5, "[1, inf)")
    """Guidance of the teachers that have no `guidance_scale` of their own; 1.0 is without."""


def check_tasks(
    values: Mapping[str, Any],
    problems: Problems,
    *,
    from_rewards: bool,
    reward_names: Collection[str],
    defaults: Mapping[str, Any],
    with_test: bool,
) -> tuple[tuple[Task, ...], tuple[int, ...]]:
    """The tasks, and how many training prompts each has; what is wrong with them goes to ``problems``.

    ``defaults``: what a task has that does not say so itself; ``with_test``: test prompts must be there too.
    """
    where = "train.teachers"
    if not problems.good(where):
        return (), ()
    entries = values[where] or (_single_task(values) if from_rewards else [])
    if not entries:
        remedy = "Give at least one task, or dataset, prompt_fn and reward_fn, as in config/teacher.py."
        problems.add(where, "is empty", remedy if from_rewards else "Give at least one teacher, as in config/opd.py.")
    tasks, prompts = [], []
    for index, entry in enumerate(entries):
        place = f"{where}[{index}]"
        if not isinstance(entry, Mapping):
            problems.add(place, f"is {entry!r}", f"It must be a dict with {', '.join(FIELDS)}.")
            continue
        given = {name: value for name, value in entry.items() if value is not None}
        fields = {name: declared.default for name, declared in FIELDS.items()} | dict(defaults) | given
        _check_fields(place, fields, problems, reward_names)
        if from_rewards:
            fields["lora_path"] = ""
            if fields["proxy_reward"] == {}:
                problems.add(f"{place}.proxy_reward", "is empty", "Name the rewards to train on, {reward: weight}.")
        elif problems.good(f"{place}.lora_path"):
            check_adapter(f"{place}.lora_path", fields["lora_path"], problems)
        prompts.append(_check_dataset(place, fields, with_test, problems))
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
    for name, weight in fields.get("proxy_reward", {}).items() if problems.good(rewards) else ():
        if not is_number(weight):
            problems.add(rewards, f"gives {name} the weight {weight!r}", "A weight must be a finite number.")
        if reward_names is not None and name not in reward_names:
            remedy = nearest(str(name), reward_names).strip() or f"Known are {', '.join(sorted(reward_names))}."
            problems.add(rewards, f"names the unknown reward {name!r}", remedy)


def _single_task(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The task that the upstream keys of single-task reinforcement learning describe."""
    if not values.get("dataset"):
        return []
    name = re.sub(r"[^\w-]", "_", Path(str(values["dataset"])).name)
    fields = {"dataset": values["dataset"], "prompt_fn": values["prompt_fn"], "proxy_reward": values["reward_fn"]}
    return [{"name": name, **fields}]


def _check_dataset(place: str, fields: Mapping[str, Any], with_test: bool, problems: Problems) -> int:
    """Check the prompt files of a task and return the number of training prompts."""
    one, several = f"{place}.dataset", f"{place}.datasets"
    if not problems.good(one, several, f"{place}.prompt_fn"):
        return 0
    if not fields["datasets"]:
        return _check_folder(one, fields["dataset"], fields["prompt_fn"], with_test, problems)
    if fields["dataset"]:
        problems.add(several, f"is set, and so is dataset, {fields['dataset']!r}", "Set one of them to None.")
    for name, count in Counter(Path(folder).name for folder in fields["datasets"]).items():
        if count > 1:
            problems.add(several, f"has {count} folders called {name!r}", "Evaluations name them so: rename one.")
    return sum(_check_folder(several, each, fields["prompt_fn"], with_test, problems) for each in fields["datasets"])


def _check_folder(key: str, folder: str, prompt_fn: str, with_test: bool, problems: Problems) -> int:
    """Check the prompt files of a folder and return the number of training prompts."""
    if what := gap(folder):
        problems.add(key, what, "Name the folder with the prompt files.")
        return 0
    pattern = FORMATS[prompt_fn][0]
    train, test = (Path(folder, pattern.format(split=split)) for split in ("train", "test"))
    for file, needed in ((train, True), (test, with_test)):
        if needed and not file.is_file():
            what = f"lacks {file}, which prompt_fn {prompt_fn!r} reads"
            problems.add(key, what, "dataset/README.md says where prompt files come from.")
    count = sum(1 for line in train.read_bytes().split(b"\n") if line.strip()) if train.is_file() else 0
    if train.is_file() and not count:
        problems.add(key, f"has no prompt in {train}", "Put one on each line.")
    return count
