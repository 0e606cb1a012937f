"""What a configuration points to: model, adapters, prompt files, folders, optional packages. Nothing is downloaded."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from diffusionopd.config_schema.problems import Problems, nearest
from diffusionopd.config_schema.values import REWARD_ALGORITHMS, is_number, unset

TRACKERS = ("tensorboard", "wandb")
PROMPT_FILES = {"general_ocr": "{split}.txt", "geneval": "{split}_metadata.jsonl"}
_PLACEHOLDER = re.compile(r"path[/_]to|<[^>]*>|your[-_]|\.\.\.|\btodo\b|placeholder", re.IGNORECASE)
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)+")


@dataclass(frozen=True)
class TeacherSpec:
    """One task: its prompts, its teacher and the rewards that monitor it, or that it is trained on."""

    name: str
    dataset: str
    lora_path: str  # empty when the training is from rewards
    proxy_reward: dict[str, float]
    prompt_fn: str
    guidance_scale: float
    eval_guidance_scale: float  # of the student, in evaluations on this task
    eval_num_steps: int


TEACHER_FIELDS = tuple(field.name for field in fields(TeacherSpec))


def _is_hub_id(source: str) -> bool:
    """Whether ``source`` can only be meant for the hub: ``owner/name[/sub/folder]``, with no such folder here."""
    first = source.split("/")[0]
    return bool(_HUB_ID.fullmatch(source)) and not first.startswith(".") and not Path(first).exists()


def with_origin(source: str) -> str:
    """``source`` for messages, with a word when it is no path here and so is looked up on the hub."""
    return f"{source} (hub)" if not Path(source).exists() else source


def _gap(source: Any) -> str:
    """Why ``source`` is no path or hub id at all; empty if it may be one."""
    if source is None or isinstance(source, str) and unset(source):
        return "is not set"
    if not isinstance(source, str):
        return f"is {source!r}, which is not a string"
    if not _is_path(source):
        return f"is {source[:80]!r}, which can be no path"
    return f"is {source!r}, a placeholder" if _PLACEHOLDER.search(source) else ""


def _is_path(text: str) -> bool:
    """Whether the system can look it up: without NUL and halves of surrogate pairs, and not too long."""
    try:
        os.stat(text)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return True
    except (OSError, ValueError):
        return False
    return True


def check_model(values: dict[str, Any], problems: Problems) -> None:
    """The base model is a hub id or a diffusers folder that is there."""
    key = "pretrained.model"
    if not problems.good(key):
        return
    remedy = "Give a hub id (organisation/name) or a local diffusers pipeline folder."
    model = values[key]
    if gap := _gap(model):
        problems.add(key, gap, remedy)
    elif Path(model).exists():
        if not (Path(model) / "model_index.json").is_file():
            problems.add(key, f"is {model}, which has no model_index.json", remedy)
    elif not _is_hub_id(model) or model.count("/") != 1:
        problems.add(key, f"is {model}, which does not exist here", remedy)


def _check_adapter(key: str, source: Any, problems: Problems) -> None:
    remedy = "Give a LoRA folder, a .safetensors file or a hub id (organisation/name/sub/folder)."
    if gap := _gap(source):
        problems.add(key, gap, remedy)
        return
    path = Path(source)
    if path.is_dir() and not any((*path.glob("*.safetensors"), *path.glob("lora/*.safetensors"))):
        problems.add(key, f"is {source}, a folder without a .safetensors file", remedy)
    elif path.is_file() and path.suffix != ".safetensors":
        problems.add(key, f"is {source}, which is not a .safetensors file", remedy)
    elif not path.exists() and (path.suffix == ".safetensors" or not _is_hub_id(source)):
        problems.add(key, f"is {source}, which does not exist here", remedy)


def check_folders(values: dict[str, Any], problems: Problems) -> None:
    """Run folder and cache can be written, and what is resumed from is there."""
    for key in ("save_dir", "logdir", "run_name", "cache_dir", "resume_from"):
        if problems.good(key) and values[key] and not _is_path(values[key]):
            problems.add(key, f"is {values[key][:80]!r}, which can be no path", "Name a folder.")
    if problems.good("save_dir", "logdir", "run_name"):
        if unset(values["save_dir"]) and (unset(values["run_name"]) or unset(values["logdir"])):
            problems.add("run_name", "is empty", "Set run_name (and logdir), or save_dir.")
        else:
            key = "logdir" if unset(values["save_dir"]) else "save_dir"
            _check_writable(key, run_folder(values["save_dir"], values["logdir"], values["run_name"]), problems)
    if problems.good("cache_dir"):
        if unset(values["cache_dir"]):
            problems.add("cache_dir", "is empty", "Name a folder for the prompt embeddings.")
        else:
            _check_writable("cache_dir", Path(values["cache_dir"]), problems)
    if problems.good("resume_from") and not unset(values["resume_from"]) and values["resume_from"] != "auto":
        folder = Path(values["resume_from"])
        if not (folder / "state").is_dir():
            what = "has no state/ to resume from" if folder.is_dir() else "does not exist"
            problems.add("resume_from", f"is {folder}, which {what}", 'Name a checkpoint-<n> folder, or use "auto".')
    if problems.good("train.lora_path") and not unset(values["train.lora_path"]):
        _check_adapter("train.lora_path", values["train.lora_path"], problems)


def run_folder(save_dir: str | None, logdir: str, run_name: str) -> Path:
    """``save_dir`` where it is set, else ``<logdir>/<run_name>``."""
    return Path(logdir, run_name) if save_dir is None or unset(save_dir) else Path(save_dir)


def _check_writable(key: str, folder: Path, problems: Problems) -> None:
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        problems.add(key, f"needs the folder {folder}, but {existing} is a file", "Name another folder.")
    elif not os.access(existing, os.W_OK | os.X_OK):
        problems.add(key, f"needs the folder {folder}, but {existing} is not writable", "Name another folder.")


def check_packages(values: dict[str, Any], problems: Problems) -> None:
    """Optional packages that the settings need are installed."""
    if problems.good("log_with") and values["log_with"] not in (None, "", "none"):
        names = [name.strip() for name in values["log_with"].split(",")]
        if unknown := [name for name in names if name not in TRACKERS]:
            remedy = 'Use "none", "tensorboard", "wandb" or "wandb,tensorboard".'
            problems.add("log_with", f"names {', '.join(map(repr, unknown))}", remedy)
        elif missing := [name for name in names if find_spec(name) is None]:
            problems.add("log_with", f"needs {', '.join(missing)}", f"pip install -e '.[{','.join(missing)}]'")
    if values.get("train.use_8bit_adam") is True and find_spec("bitsandbytes") is None:
        problems.add("train.use_8bit_adam", "needs bitsandbytes", "pip install bitsandbytes, or set it to False.")


def check_teachers(
    values: dict[str, Any], problems: Problems, reward_names: Collection[str] | None
) -> tuple[tuple[TeacherSpec, ...], tuple[int, ...]]:
    """The teachers, and how many training prompts each has; what is wrong with them goes to ``problems``."""
    key = "train.teachers"
    if not problems.good(key):
        return (), ()
    from_rewards = values.get("train.algorithm") in REWARD_ALGORITHMS
    entries = values[key] or (_single_task(values) if from_rewards else [])
    if not entries:
        remedy = "Give at least one task, or dataset, prompt_fn and reward_fn, as in config/teacher.py."
        problems.add(key, "is empty", remedy if from_rewards else "Give at least one teacher, as in config/opd.py.")
        return (), ()
    defaults: dict[str, Any] = {
        "guidance_scale": values.get("sample.teacher_guidance_scale"),
        "proxy_reward": {},
    }
    common: dict[str, Any] = {name: values.get(f"sample.{name}") for name in ("eval_guidance_scale", "eval_num_steps")}
    with_test = values.get("eval_freq") != 0
    specs, prompts = [], []
    for index, entry in enumerate(entries):
        where = f"{key}[{index}]"
        if not isinstance(entry, Mapping):
            problems.add(where, f"is {entry!r}", f"It must be a dict with {', '.join(TEACHER_FIELDS)}.")
            continue
        given = {name: value for name, value in entry.items() if value is not None}
        teacher: dict[str, Any] = dict.fromkeys(field for field in TEACHER_FIELDS if field not in common)
        teacher |= defaults | given
        _check_teacher_fields(where, teacher, problems)
        _check_rewards(f"{where}.proxy_reward", teacher["proxy_reward"], reward_names, problems)
        if from_rewards:
            teacher["lora_path"] = ""
            if not teacher["proxy_reward"]:
                problems.add(f"{where}.proxy_reward", "is empty", "Name the rewards to train on, {reward: weight}.")
        else:
            _check_adapter(f"{where}.lora_path", teacher["lora_path"], problems)
        prompts.append(_check_dataset(where, teacher, with_test, problems))
        specs.append(TeacherSpec(**{name: (common | teacher)[name] for name in TEACHER_FIELDS}))
    names = [spec.name for spec in specs]
    for name in sorted({name for name in names if isinstance(name, str) and names.count(name) > 1}):
        problems.add(f"{key}[].name", f"is {name!r} for {names.count(name)} teachers", "Names must differ.")
    return tuple(specs), tuple(prompts)


def check_tasks(entries: Sequence[Any], problems: Problems) -> None:
    """The tasks of a saved run: their fields are what a task may have, whether or not the files still exist."""
    for index, entry in enumerate(entries):
        where = f"train.teachers[{index}]"
        if not isinstance(entry, Mapping):
            problems.add(where, f"is {entry!r}", "It must be an object.")
            continue
        given = {name: value for name, value in entry.items() if name in TEACHER_FIELDS and value is not None}
        _check_teacher_fields(where, {"name": None, "guidance_scale": 1.0} | given, problems)
        _check_rewards(f"{where}.proxy_reward", given.get("proxy_reward", {}), None, problems)
        for field in ("dataset", "lora_path", "prompt_fn"):
            if not isinstance(given.get(field, ""), str) or not _is_path(given.get(field, "")):
                problems.add(f"{where}.{field}", f"is {given[field]!r}", "It must be a string.")


def _single_task(values: dict[str, Any]) -> list[dict[str, Any]]:
    """The task that the upstream keys of single-task reinforcement learning describe."""
    if not values.get("dataset"):
        return []
    name = re.sub(r"[^\w-]", "_", Path(str(values["dataset"])).name)
    fields = {"dataset": values["dataset"], "prompt_fn": values["prompt_fn"], "proxy_reward": values["reward_fn"]}
    return [{"name": name, **fields}]


def _check_teacher_fields(where: str, teacher: dict[str, Any], problems: Problems) -> None:
    for field in teacher.keys() - set(TEACHER_FIELDS):
        remedy = nearest(field, TEACHER_FIELDS).strip() or f"Fields are {', '.join(TEACHER_FIELDS)}."
        problems.add(f"{where}.{field}", "is not a field of a teacher", remedy)
    name = teacher["name"]
    if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name):
        problems.add(f"{where}.name", f"is {name!r}", 'It must be made of letters, digits, "-" and "_".')
    for field in [field for field in ("guidance_scale", "eval_guidance_scale") if field in teacher]:
        if not is_number(teacher[field]) or teacher[field] < 1:
            problems.add(
                f"{where}.{field}", f"is {teacher[field]!r}", "It must be a number of at least 1 (1: without)."
            )
    steps = teacher.get("eval_num_steps", 1)
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        problems.add(f"{where}.eval_num_steps", f"is {steps!r}", "It must be an integer of at least 1.")


def _check_rewards(where: str, rewards: Any, known: Collection[str] | None, problems: Problems) -> None:
    if not isinstance(rewards, Mapping):
        problems.add(where, f"is {rewards!r}", "It must be a dict {reward: weight}.")
        return
    for name, weight in rewards.items():
        if not is_number(weight):
            problems.add(where, f"gives {name} the weight {weight!r}", "A weight must be a finite number.")
        if known is not None and name not in known:
            remedy = nearest(str(name), known).strip() or f"Known are {', '.join(sorted(known))}."
            problems.add(where, f"names the unknown reward {name!r}", remedy)


def _check_dataset(where: str, teacher: dict[str, Any], with_test: bool, problems: Problems) -> int:
    """Check the prompt files of a task and return the number of training prompts."""
    prompt_fn, dataset = teacher["prompt_fn"], teacher["dataset"]
    if not isinstance(prompt_fn, str) or prompt_fn not in PROMPT_FILES:
        remedy = f"It must be one of {', '.join(PROMPT_FILES)}.{nearest(str(prompt_fn), PROMPT_FILES)}"
        problems.add(f"{where}.prompt_fn", f"is {prompt_fn!r}", remedy)
        return 0
    if gap := _gap(dataset):
        problems.add(f"{where}.dataset", gap, "Name the folder with the prompt files.")
        return 0
    files = {split: Path(dataset, PROMPT_FILES[prompt_fn].format(split=split)) for split in ("train", "test")}
    for split, file in files.items():
        if not file.is_file() and (split == "train" or with_test):
            needed = f"prompt_fn {prompt_fn!r}" + (" with eval_freq" if split == "test" else "")
            remedy = "dataset/README.md says where prompt files come from."
            problems.add(f"{where}.dataset", f"lacks {file}, which {needed} reads", remedy)
    if not files["train"].is_file():
        return 0
    with files["train"].open("rb") as lines:
        count = sum(1 for line in lines if line.strip())
    if count == 0:
        problems.add(f"{where}.dataset", f"has no prompt in {files['train']}", "Put one on each line.")
    return count
