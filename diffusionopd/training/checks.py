"""Everything that can be known to be wrong with a configuration before weights load."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from diffusionopd.algorithms import ALGORITHMS, Algorithm
from diffusionopd.algorithms.optim import OptimizerSettings
from diffusionopd.algorithms.settings import SamplerSettings
from diffusionopd.config_schema import (
    ConfigError,
    Problems,
    check_no_secrets,
    comparable,
    flatten,
    keys_of,
    read,
    to_plain,
    unset,
    unwritable,
)
from diffusionopd.config_schema.paths import check_adapter, check_model, check_writable, gap
from diffusionopd.data.prompts import REFERENCE, PromptError, load_folders
from diffusionopd.data.rounds import CASCADE, TOGETHER, BatchSettings, RoundShape, round_shape, tasks_per_round
from diffusionopd.data.tasks import Task, check_tasks
from diffusionopd.models.backbone import EMBEDDED
from diffusionopd.models.loading import BackboneError, ModelInfo, is_here, read_model
from diffusionopd.models.lora_files import LoraWeights
from diffusionopd.models.lora_fit import ends_in, find_all, find_targets, linear_layers
from diffusionopd.models.settings import FRESH, FROM_TEACHERS, BaseSettings
from diffusionopd.models.teacher_models import TeacherModel, read_teacher_model
from diffusionopd.rewards import REGISTRY, RewardError, check_options, lacking
from diffusionopd.training.checkpoint import CheckpointError, locate
from diffusionopd.training.keys import SCHEMA, is_used, unsaved, with_loras, with_paths
from diffusionopd.training.plan import Plan, T
from diffusionopd.training.settings import RunSettings, WatchSettings

# What a task has that does not say so itself.
_TASK_DEFAULTS = {
    "guidance_scale": "sample.teacher_guidance_scale",
    "eval_guidance_scale": "sample.eval_guidance_scale",
    "eval_num_steps": "sample.eval_num_steps",
}


def check(config: ConfigDict, num_processes: int, *, sources: bool = True, model: ModelInfo | None = None) -> Plan:
    """Check everything that can be checked without loading weights, and derive the counts of a round.

    ``num_processes`` is the number of processes of the whole run. Without ``sources`` the prompt files, teachers,
    model, folders and packages need not be there: for counting only, ``num_prompts`` may be 0. ``model`` is what is
    known of a base that need not be here. Paths are looked up as of :func:`with_paths`. Nothing is downloaded or
    written. Raises ConfigError with every problem found.
    """
    if num_processes < 1:
        raise ValueError(f"num_processes is {num_processes}; it must be at least 1")

    # Keys by themselves
    config = with_loras(config)
    check_no_secrets(to_plain(config))  # alone: the other problems quote values
    values = flatten(with_paths(config))
    problems = Problems(() if sources else (".dataset", ".datasets", ".lora_path"))
    SCHEMA.check(values, lambda name: is_used(name, values.get("train.algorithm", "")), problems)
    algorithm = ALGORITHMS[values["train.algorithm"]] if problems.good("train.algorithm") else Algorithm

    # What they point to
    if sources:
        _find_runs(values, problems)
        _check_sources(values, problems)
    model = model or _read_local_model(values, problems)
    _fill(values, model, problems)
    tasks, num_prompts = check_tasks(
        values,
        problems,
        from_rewards=algorithm.has_rewards,
        with_teachers=algorithm.uses_teachers(values),
        reward_names=REGISTRY,
        defaults={field: values[name] for field, name in _TASK_DEFAULTS.items() if problems.good(name)},
        with_test=values.get("eval_freq") != 0,
        scored=_scored(values, algorithm),
    )
    placed = _placed(tasks, values)
    teachers = placed if algorithm.uses_teachers(values) else {}
    own: dict[str, TeacherModel] = {}
    lora_notes: list[str] = []
    if model:
        _check_references(placed, model, problems)
    if sources:
        _check_start(values, algorithm, teachers, problems)
        own = _check_teacher_models(values, teachers, model, problems)
    if model:
        _check_fits(values, placed, algorithm, model, own, problems)
    if sources:
        lora_notes = _check_loras(values, teachers, model, own, problems)
    if problems.good("reward_options"):
        try:
            check_options(values["reward_options"])
        except RewardError as error:
            problems.add("reward_options", f"cannot be used: {error}", "")

    # What must go together
    sampler, batches = _read_good(SamplerSettings, values, problems), _read_good(BatchSettings, values, problems)
    if sampler:
        sampler.check(problems)
    if batches and problems.good("train.teachers"):
        passes = sampler.num_inner_epochs if sampler else 1
        _check_drawn_tasks(values, len(tasks), problems)
        batches.check(tasks_per_round(values), num_processes, algorithm.one_step, passes, problems)
    if optimization := _read_good(OptimizerSettings, values, problems):
        optimization.check(problems)
    settings = _read_good(algorithm.groups[0], values, problems) if sampler and algorithm is not Algorithm else None
    if settings:
        algorithm.check(settings, sampler, teachers, values, problems)
    if algorithm.has_rewards and num_processes > 1:
        _check_timeouts(values, problems)
    if problems.found:
        raise ConfigError(problems.found)

    # The plan
    assert sampler and batches
    run, watch = read(RunSettings, values), read(WatchSettings, values)
    shape = round_shape(batches, len(tasks), num_processes, run.num_epochs, values["seed"])
    notes = (*_notes(values, sampler, algorithm, settings, shape), *lora_notes)
    notes += tuple(_reward_notes(tasks, watch)) if sources and not algorithm.has_rewards else ()
    train, test = (tuple(counts[split] for counts in num_prompts) for split in ("train", "test"))
    plan = Plan(settings, sampler, shape, tasks, model, own, values, algorithm, run, watch, train, test, notes)
    return replace(plan, notes=(*notes, *plan.costly()))


def absent_rewards(tasks: Sequence[Task], watch: WatchSettings) -> list[str]:
    """What is lacking here for each reward that cannot be built, one line each."""
    names = dict.fromkeys(name for task in tasks for name in task.proxy_reward)
    return [what for name in names if (what := lacking(name, watch.reward_options.get(name, {})))]


def _reward_notes(tasks: Sequence[Task], watch: WatchSettings) -> Iterator[str]:
    """Rewards that are left out of a run that can do without: none can be built, or none is named."""
    if watch.monitor_freq or watch.eval_freq:
        yield from (f"a reward is left out, it cannot be had here: {what}" for what in absent_rewards(tasks, watch))
    if watch.eval_freq and (unscored := [task.name for task in tasks if not task.proxy_reward]):
        yield f"not evaluated, as no proxy_reward scores them: {', '.join(unscored)}"


def _notes(
    values: Mapping[str, Any],
    sampler: SamplerSettings,
    algorithm: type[Algorithm],
    settings: Any,
    shape: RoundShape,
) -> list[str]:
    """Settings that are accepted but change nothing, and what else is worth a line."""
    changed = [name for name, key in SCHEMA.keys.items() if comparable(values[name]) != comparable(key.default)]
    notes = [*sampler.notes(), *algorithm.notes(settings, changed)]
    if idle := sorted(name for name in changed if name in _idle(values)):
        notes.append(f"without effect as this run is set: {', '.join(idle)}")
    if shape.task_order == CASCADE and shape.num_rounds < shape.num_tasks:
        notes.append(f"num_epochs {shape.num_rounds} leaves out some of the {shape.num_tasks} tasks of a cascade")
    if unused := sorted(name for name in changed if not is_used(name, algorithm.name)):
        what = "distillation" if algorithm.one_step else algorithm.name
        notes.insert(0, f"without effect on {what}: {', '.join(unused)}")
    if dropped := unsaved(values):
        places = (f"{what} at {place}" for name in dropped for place, what in unwritable(values[name], name))
        notes.append(f"left out of what is saved, being no values of JSON: {', '.join(places)}")
    if rest := shape.num_rounds % shape.rounds_per_step:
        notes.append(f"the last {rest} of num_epochs {shape.num_rounds} rounds end in no optimizer step")
    return notes


def _idle(values: Mapping[str, Any]) -> set[str]:
    """Keys that the others leave nothing to say."""
    found = set[str]()
    if values["train.student_init"] != FROM_TEACHERS:
        found |= {"train.student_init_scale"}
    if not unset(values["train.lora_path"]):
        found |= {"train.lora_rank", "train.lora_target_modules"}
    if not values["train.ema"]:
        found |= {"train.ema_decay", "train.ema_interval", "train.ema_repeats"}
    return found


def _read_good(group: type[T], values: Mapping[str, Any], problems: Problems) -> T | None:
    """The settings of a group with whose keys nothing is wrong so far."""
    return read(group, values) if problems.good(*(k.name for k in keys_of(group).values())) else None


def _scored(values: Mapping[str, Any], algorithm: type[Algorithm]) -> dict[str, int | None]:
    """The splits whose prompts are scored: how many of each, from the first; None for all."""
    number = values.get("eval_num_prompts")
    scored: dict[str, int | None] = {"test": number if isinstance(number, int) and number > 0 else None}
    return scored | ({"train": None} if algorithm.has_rewards or values.get("monitor_freq") != 0 else {})


def _read_local_model(values: Mapping[str, Any], problems: Problems) -> ModelInfo | None:
    """What the files of a base model here say; nothing is downloaded."""
    base = _read_good(BaseSettings, values, problems)
    if base is None or unset(base.model):
        return None
    try:
        if not is_here(base.model, base.revision or None, base.config or None):
            return None
        return read_model(**base.source, download=False)
    except BackboneError as error:
        for problem in error.problems:
            problems.add("pretrained.model", f"is {base.model}: {problem}", "")
        return None


def _placed(tasks: Sequence[Task], values: Mapping[str, Any]) -> dict[str, Task]:
    """The tasks by their places in the configuration, of which entries that are no dicts have none."""
    entries = enumerate(values["train.teachers"] or [{}]) if tasks else ()  # without entries it is the upstream keys'
    places = (f"train.teachers[{i}]" for i, entry in entries if isinstance(entry, Mapping))
    return dict(zip(places, tasks, strict=True))


def _check_references(tasks: Mapping[str, Task], model: ModelInfo, problems: Problems) -> None:
    """Prompts with an image are for a base that reads images."""
    for place, task in tasks.items():
        if not problems.good(*(f"{place}.{name}" for name in ("dataset", "datasets", "prompt_fn"))):
            continue
        try:
            (first, *_), _ = load_folders(task.folders, task.prompt_fn, "train", 1)
        except PromptError as error:  # of folders that do not go together: each was looked at before
            problems.add(f"{place}.datasets", f"cannot be used together: {error}", "")
            continue
        if first.reference and not model.family.READS_IMAGES:
            what = f"has prompts with a {REFERENCE}, such as {first.source}, which the base model does not read"
            problems.add(f"{place}.dataset", what, "Set pretrained.model to an editing model.")


def _fill(values: dict[str, Any], model: ModelInfo | None, problems: Problems) -> None:
    """Put what a configuration leaves to the base model; one problem where the base is not here."""
    left = SCHEMA.left_to_model(values)
    if model:
        values |= {name: getattr(model.defaults, field) for name, field in left.items()}
    elif left:
        known = problems.good("pretrained.model")  # else that is said, and enough
        remedy = f"Set {'it' if len(left) == 1 else 'them'}, or name a base that is here." if known else ""
        problems.add_together(list(left), "None, the base model's own value, and the base is not here", remedy, known)


def _check_fits(
    values: Mapping[str, Any],
    tasks: Mapping[str, Task],
    algorithm: type[Algorithm],
    model: ModelInfo,
    own: Mapping[str, ModelInfo],
    problems: Problems,
) -> None:
    """The resolution, the student's modules and every guidance are ones that the base model has, or a teacher's own."""
    if problems.good("resolution"):
        try:
            model.family.shape_of(values["resolution"], model.configs)
        except ValueError as error:
            problems.add("resolution", f"is {values['resolution']}: {error}", "")
    name = "max_sequence_length"
    if problems.good(name) and (problem := model.length_problem(values[name])):
        problems.add(name, f"is {values[name]}, but {problem}", "Nothing could sample the student as it was trained.")
    name, targets = "train.lora_target_modules", values["train.lora_target_modules"]
    if problems.good(name) and targets:
        try:
            find_targets(model.empty_transformer(), targets)
        except ValueError as error:
            problems.add(name, f"cannot be used: {error}", "Name ends of linear layers' names, or set it to None.")
    trained = [
        ("sample.guidance_scale", values["sample.guidance_scale"] if values["train.cfg"] is True else 1.0, model)
    ]
    if algorithm.uses_teachers(values):
        trained += [(f"{p}.guidance_scale", t.guidance_scale, own.get(t.model, model)) for p, t in tasks.items()]
    evaluated = [(f"{p}.eval_guidance_scale", t.eval_guidance_scale, model) for p, t in tasks.items()]
    variants = values["eval_variants"].values() if problems.good("eval_variants") else ()
    evaluated += [("eval_variants", own["guidance_scale"], model) for own in variants if "guidance_scale" in own]
    for name, guidance, of in [*trained, *evaluated] if values["eval_freq"] else trained:
        if problems.good(name) and (problem := of.guidance_problem(guidance)):
            problems.add(name, f"is {guidance:g}, but {problem}", "Set it to 1.0.")
    name, embedded = "train.conditional_weight", [place for place, _, of in trained if of.guidance == EMBEDDED]
    if embedded and problems.good(name) and is_used(name, values["train.algorithm"]) and values[name] > 0:
        what = f"is {values[name]:g}, but guidance is an input of the model of {', '.join(embedded)}: it has one branch"
        problems.add(name, what, "Set it to 0.")
    if model.guidance == EMBEDDED and values["train.cfg"] is False:
        usual = f"{model.defaults.guidance_scale:g} is usual"
        what = "is False, which is guidance 1, but the base model has guidance as an input: it costs no second forward"
        problems.add(
            "train.cfg", what, f"Set it to True, and sample.guidance_scale to what the student is given; {usual}."
        )


def _check_teacher_models(
    values: Mapping[str, Any], teachers: Mapping[str, Task], base: ModelInfo | None, problems: Problems
) -> dict[str, TeacherModel]:
    """What the files of teachers' own models say, of those that are here, beside a base that is here too."""
    found: dict[str, TeacherModel] = {}
    for place, task in teachers.items():
        source = task.model
        if not source or source in found:
            continue
        if what := gap(source):
            problems.add(f"{place}.model", what, "Name a model, or leave it out.")
        elif base is not None:
            try:
                model = read_teacher_model(source, base, download=False)
                if model is not None:
                    model.family.shape_of(values["resolution"], model.configs)
                    found[source] = model
            except BackboneError as error:
                problems.add(f"{place}.model", f"is {source}: {'; '.join(error.problems)}", "")
            except ValueError as error:
                problems.add(f"{place}.model", f"is {source}: {error}", "")
    return found


def _check_loras(
    values: Mapping[str, Any],
    teachers: Mapping[str, Task],
    base: ModelInfo | None,
    own: Mapping[str, TeacherModel],
    problems: Problems,
) -> list[str]:
    """What LoRAs that are here hold, and whether they fit the models that they are for, if here; returns notes."""
    sources: dict[str, dict[str, Any]] = {"": {"train.lora_path": values.get("train.lora_path")}}
    for place, task in teachers.items():
        sources.setdefault(task.model, {})[f"{place}.lora_path"] = task.lora_path
        sources[""][f"{place}.reference"] = task.reference
    notes = []
    for source, named in sources.items():
        here = {key: s for key, s in named.items() if problems.good(key) and not unset(s) and Path(s).exists()}
        try:
            model = own.get(source) if source else base
            found, wrong, said = find_all(here, source or values.get("pretrained.model") or "", model)
            if model and not source:
                starts = [lora for place, lora in found.items() if place.endswith("].lora_path")]
                _check_targets(values, starts, model, problems)
        except BackboneError as error:
            problems.add("pretrained.model", f"cannot be used: {error}", "")
            return []
        for place, what in wrong.items():
            problems.add(place, f"cannot be used: {what}", "Leave it empty for the model itself." if source else "")
        notes += said
    return notes


def _check_targets(
    values: Mapping[str, Any], teachers: Sequence[LoraWeights], model: ModelInfo, problems: Problems
) -> None:
    """A student that starts at the sum of its teachers has every layer that they have, unless it is told others."""
    name, start = "train.lora_target_modules", "train.student_init"
    if not problems.good(name, start) or values[start] != FROM_TEACHERS or not values[name]:
        return
    layers = linear_layers(model.empty_transformer())
    own = {layer for layer in layers if any(ends_in(layer, end) for end in values[name])}
    if lacking := sorted({layer for teacher in teachers for layer in teacher.a} - own):
        what = f"leaves out {len(lacking)} layers of the teachers that the student starts from, such as {lacking[0]}"
        problems.add(name, what, f"Add their names, or set {start} to {FRESH!r}.")


def _check_sources(values: Mapping[str, Any], problems: Problems) -> None:
    if problems.good("pretrained.model"):
        check_model("pretrained.model", values["pretrained.model"], problems, or_file=True)
    if problems.good("pretrained.config") and not unset(values["pretrained.config"]):
        check_model("pretrained.config", values["pretrained.config"], problems)
    if run := _read_good(RunSettings, values, problems):
        run.check(problems)
    if problems.good("cache_dir"):
        if unset(values["cache_dir"]):
            problems.add("cache_dir", f"is {values['cache_dir']!r}", "Name a folder for prompt embeddings.")
        else:
            check_writable("cache_dir", Path(values["cache_dir"]), problems)
    if problems.good("train.lora_path") and not unset(values["train.lora_path"]):
        check_adapter("train.lora_path", values["train.lora_path"], problems)
    if values.get("train.use_8bit_adam") is True and find_spec("bitsandbytes") is None:
        problems.add("train.use_8bit_adam", "needs bitsandbytes", "pip install bitsandbytes, or set it to False.")


def _check_drawn_tasks(values: Mapping[str, Any], num_tasks: int, problems: Problems) -> None:
    name, drawn = "train.tasks_per_round", values["train.tasks_per_round"]
    if drawn and values["train.task_order"] != TOGETHER:
        remedy = f"Set it to 0, or train.task_order to {TOGETHER!r}."
        problems.add(name, f"is {drawn}, but train.task_order is {values['train.task_order']!r}", remedy)
    elif drawn > num_tasks:
        problems.add(name, f"is {drawn}, more than the {num_tasks} tasks", "Set it to 0 for all of them.")


def _check_start(
    values: Mapping[str, Any], algorithm: type[Algorithm], teachers: Mapping[str, Task], problems: Problems
) -> None:
    """A start from the teachers is the only start, and there are teachers."""
    name = "train.student_init"
    if not problems.good(name, "train.lora_path") or values[name] != FROM_TEACHERS:
        return
    if not unset(values["train.lora_path"]):
        what = f"is {FROM_TEACHERS!r}, and train.lora_path names a start too"
        problems.add(name, what, f"Leave one of them out: set it to {FRESH!r}, or train.lora_path to None.")
    remedy = f"Set it to {FRESH!r}, or name a LoRA in train.lora_path."
    if problems.good("train.algorithm") and not algorithm.has_teachers:
        problems.add(name, f"is {FROM_TEACHERS!r}, but {algorithm.name} learns from rewards", remedy)
    elif others := [place for place, task in teachers.items() if task.model]:
        listed = ", ".join(others)
        what = f"is {FROM_TEACHERS!r}, but with a model of its own ({listed}) no LoRA of the base is there"
        problems.add(name, what, remedy)


def _find_runs(values: dict[str, Any], problems: Problems) -> None:
    """Put the checkpoint of it in the place of a run folder that a LoRA is to come from."""
    tasks = values["train.teachers"] if problems.good("train.teachers") else []
    named = [(f"train.teachers[{i}].", task) for i, task in enumerate(tasks) if isinstance(task, dict)]
    places = [(place, holder, name) for place, holder in named for name in ("lora_path", "reference")]
    for place, holder, name in [("", values, "train.lora_path"), *places]:
        if isinstance(path := holder.get(name), str) and not unset(path):
            try:
                if (found := locate(path)) != Path(path):
                    holder[name] = str(found)
            except CheckpointError as error:
                problems.add(place + name, f"is {path}: {error}", "Name a LoRA, or a run with a valid checkpoint.")


def _check_timeouts(values: Mapping[str, Any], problems: Problems) -> None:
    """Processes must wait for each other longer than one of them may wait for a reward that is trained on."""
    scoring, waiting = "reward_timeout", "collective_timeout"
    if problems.good(scoring, waiting) and values[scoring] >= values[waiting]:
        what = f"is {values[scoring]:g} seconds, not below the {values[waiting]:g} of {waiting}"
        remedy = f"While one process waits for a reward the others wait for it: raise {waiting} above it, or lower it."
        problems.add(scoring, what, remedy)
