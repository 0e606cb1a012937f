"""The tasks of a run: their prompts, teachers and rewards."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusionopd.config_schema import FREE, REWARDS, TEACHERS, Problems, is_number, key, keys_of, nearest
from diffusionopd.config_schema.paths import check_adapter, gap
from diffusionopd.data.prompts import FORMATS


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[\w-]+", value) is not None


@dataclass(frozen=True)
class Task:
    """An entry of ``train.teachers``: one task, with its teacher or the rewards it is trained on."""

    name: str = key("name", "", form=('made of letters, digits, "-", "_"', _is_name))
    """Of the task, in logs and files."""
    dataset: str = key("dataset", "")
    """Folder with the prompts: {train,test}.txt or {train,test}_metadata.jsonl."""
    lora_path: str = key("lora_path", "", resume=TEACHERS)
    """The teacher: a local folder, a LoRA file, or a place on the hub ("owner/name[/folder or file][@revision]");
    docs/loras.md has the formats. Without effect when the training is from rewards."""
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
    eval_guidance_scale: float = key("eval_guidance_scale", 4.5, "[1, inf)", resume=FREE)
    """Guidance of the student in evaluations on this task; optional (`sample.eval_guidance_scale`)."""
    eval_num_steps: int = key("eval_num_steps", 40, "[1, inf)", resume=FREE)
    """Sampler steps in evaluations on this task; optional (`sample.eval_num_steps`)."""

    @property
    def adapter(self) -> str:
        """The teacher's adapter: a task may be called anything, a module attribute may not."""
        return "teacher_" + "".join(c if c.isalnum() else "_" for c in self.name)


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
    if not problems.good(key := f"{place}.dataset", f"{place}.prompt_fn"):
        return 0
    if what := gap(fields["dataset"]):
        problems.add(key, what, "Name the folder with the prompt files.")
        return 0
    pattern = FORMATS[fields["prompt_fn"]][0]
    train, test = (Path(fields["dataset"], pattern.format(split=split)) for split in ("train", "test"))
    for file, needed in ((train, True), (test, with_test)):
        if needed and not file.is_file():
            what = f"lacks {file}, which prompt_fn {fields['prompt_fn']!r} reads"
            problems.add(key, what, "dataset/README.md says where prompt files come from.")
    count = sum(1 for line in train.read_bytes().split(b"\n") if line.strip()) if train.is_file() else 0
    if train.is_file() and not count:
        problems.add(key, f"has no prompt in {train}", "Put one on each line.")
    return count
