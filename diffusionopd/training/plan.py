"""The keys of a run, the schema of all keys, and the plan: a checked configuration with the counts that follow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from ml_collections import ConfigDict

from diffusionopd import config_schema
from diffusionopd.algorithms import ALGORITHMS, Algorithm, AlgorithmSettings
from diffusionopd.algorithms.base import Nfe, RoundPlan, SamplerSettings
from diffusionopd.algorithms.optim import EmaSettings, OptimizerSettings
from diffusionopd.config_schema import (
    FREE,
    READ,
    SECTIONS,
    WRITE,
    ConfigError,
    Problems,
    Schema,
    check_no_secrets,
    comparable,
    flatten,
    is_number,
    key,
    keys_of,
    placed,
    read,
    to_plain,
    unset,
    unwritable,
)
from diffusionopd.config_schema.paths import check_adapter, check_model, check_writable, gap, with_origin
from diffusionopd.config_schema.upstream import UpstreamSettings
from diffusionopd.data.batches import NoiseSettings
from diffusionopd.data.loras import read_loras
from diffusionopd.data.prompts import REFERENCE, PromptError, load_folders
from diffusionopd.data.rounds import CASCADE, TOGETHER, BatchSettings, fitted_round, round_shape, tasks_per_round
from diffusionopd.data.tasks import FIELDS, Task, TaskSettings, check_tasks, is_name, loss_weights
from diffusionopd.files import looked_in
from diffusionopd.models.backbone import DTYPES, EMBEDDED, BackboneError, ModelInfo, is_here, read_model
from diffusionopd.models.lora_fit import find_all
from diffusionopd.models.schedules import FAMILY
from diffusionopd.models.settings import FRESH, FROM_TEACHERS, BaseSettings, LoraSettings, MemorySettings
from diffusionopd.models.teacher_models import TeacherModel, read_teacher_model
from diffusionopd.rewards import REGISTRY, RewardError, check_options
from diffusionopd.training.checkpoint import CheckpointError, locate
from diffusionopd.training.trackers import TRACKERS

T = TypeVar("T")


@dataclass(frozen=True)
class RunSettings:
    """The run."""

    run_name: str = key("run_name", "", resume=FREE)
    """Name of the run: its folder under `logdir`, and its name in the tracker. Empty: the configuration's name."""
    logdir: str = key("logdir", "logs", path=WRITE, resume=FREE)
    """Folder that holds the folders of runs."""
    save_dir: str = key("save_dir", "", path=WRITE, resume=FREE)
    """The run folder itself. Empty: `<logdir>/<run_name>`."""
    num_epochs: int = key("num_epochs", 100000, "[1, inf)", resume=FREE)
    """Rounds to train, in total: a resumed run counts those already done."""
    save_freq: int = key("save_freq", 20, "[0, inf)", resume=FREE)
    """Rounds between checkpoints; 0 saves at the end only. A checkpoint is always saved at the end."""
    num_checkpoint_limit: int = key("num_checkpoint_limit", 5, "[0, inf)", resume=FREE)
    """How many checkpoints to keep, the newest; 0 keeps all."""
    resume_from: str = key("resume_from", None, path=READ, resume=FREE)
    """Where to start from: None or "" afresh, the path of a checkpoint folder or of a run (its latest checkpoint), or
    "auto": the newest checkpoint of the run folder, afresh if there is none."""
    log_with: str = key("log_with", "none", resume=FREE)
    """Trackers besides metrics.jsonl: "none", "tensorboard", "wandb", "swanlab", "mlflow", or several with commas. They
    get the numbers of each round, sample grids (`sample_freq`) and a table of each evaluation (`eval_freq`)."""
    run_project: str = key("run_project", "diffusionopd", resume=FREE)
    """Project name in the tracker."""
    collective_timeout: float = key("collective_timeout", 1800.0, "(0, inf)", resume=FREE)
    """Seconds that a process waits for the others at a barrier before it ends with an error that names the missing
    ones. Encoding prompts for the first time may take hours whatever this says."""

    @property
    def run_dir(self) -> Path:
        """``save_dir`` where it is set, else ``<logdir>/<run_name>``; absolute."""
        parts = (self.logdir or "", self.run_name or "") if unset(self.save_dir) else (self.save_dir,)
        return Path(*parts).absolute()

    @property
    def trackers(self) -> list[str]:
        """The names in ``log_with``."""
        return tracker_names(self.log_with)

    def check(self, problems: Problems) -> None:
        """The folder can be written, what is resumed from is there, trackers are installed."""
        if unset(self.save_dir) and (unset(self.run_name) or unset(self.logdir)):
            problems.add("run_name", "is empty", "Set run_name (and logdir), or save_dir.")
        else:
            check_writable("logdir" if unset(self.save_dir) else "save_dir", self.run_dir, problems)
        if not unset(self.resume_from) and self.resume_from != "auto":
            remedy = 'Name a checkpoint-<n> folder, or use "auto".'
            try:
                folder = locate(self.resume_from)
            except CheckpointError as error:
                problems.add("resume_from", f"is {self.resume_from}: {error}", remedy)
            else:
                if not (folder / "state").is_dir():
                    there = "has no state/ to resume from"
                    what = there if folder.is_dir() else f"does not exist{looked_in(folder)}"
                    problems.add("resume_from", f"is {folder}, which {what}", remedy)
        if unknown := [name for name in self.trackers if name not in TRACKERS]:
            remedy = f'Use "none", or some of {", ".join(TRACKERS)} with commas.'
            problems.add("log_with", f"names {', '.join(map(repr, unknown))}", remedy)
        elif missing := [name for name in self.trackers if find_spec(name) is None]:
            problems.add("log_with", f"needs {', '.join(missing)}", f"pip install -e '.[{','.join(missing)}]'")


def tracker_names(log_with: str | None) -> list[str]:
    """The names in the key ``log_with``; "none", in any case, is none."""
    return [name for part in str(log_with or "").split(",") if not unset(name := part.strip())]


_VARIANTS = '{name: {"guidance_scale": at least 1, "num_steps": at least 1}}, a name of letters, digits, "-", "_"'


def _are_variants(value: Mapping[Any, Any]) -> bool:
    fields = {
        "guidance_scale": lambda x: is_number(x) and x >= 1,
        "num_steps": lambda x: type(x) is int and x >= 1,
    }
    return all(
        is_name(name) and isinstance(own, Mapping) and own and all(f in fields and fields[f](x) for f, x in own.items())
        for name, own in value.items()
    )


@dataclass(frozen=True)
class WatchSettings:
    """Monitoring and evaluation."""

    monitor_freq: int = key("monitor_freq", 10, "[0, inf)", resume=FREE)
    """Rounds between scorings of a round's own images with each task's `proxy_reward`; 0 is never. Scores are logged,
    not trained on."""
    sample_freq: int = key("sample_freq", 10, "[0, inf)", resume=FREE)
    """Rounds between grids of sample images in `<run folder>/samples`; 0 is never."""
    eval_freq: int = key("eval_freq", 20, "[0, inf)", resume=FREE)
    """Rounds between evaluations on the test prompts of every task, with the EMA student; 0 is never. The first is
    before round 1, of what the student starts as."""
    eval_num_prompts: int = key("eval_num_prompts", 0, "[0, inf)", resume=FREE)
    """Test prompts per task (all processes together), and folder of it, in such an evaluation; 0 is all."""
    eval_num_steps: int = key("sample.eval_num_steps", 40, "[1, inf)", resume=FREE, from_model="num_steps")
    """Sampler steps in evaluation: of the first-order ODE, of the second-order one where the base's pipeline is."""
    eval_guidance_scale: float = key(
        "sample.eval_guidance_scale", 4.5, "[1, inf)", resume=FREE, from_model="guidance_scale"
    )
    """Classifier-free guidance in evaluation; 1.0 is without."""
    eval_variants: dict = key("eval_variants", {}, form=(_VARIANTS, _are_variants), resume=FREE)
    """Evaluations to make beside each: {name: {"guidance_scale": ..., "num_steps": ...}}, of which one may be left out
    to be the task's. Such as {"unguided": {"guidance_scale": 1.0}}, logged as `eval/<task>@unguided/<reward>`."""
    test_batch_size: int = key("sample.test_batch_size", 1, "[1, inf)", resume=FREE)
    """Images per process in a batch of the evaluation."""
    reward_options: dict = key(
        "reward_options",
        {},
        form=(
            "{reward: {option: value}}",
            lambda value: isinstance(value, Mapping) and all(isinstance(v, Mapping) for v in value.values()),
        ),
    )
    """What scorers are built with: {reward: {option: value}}, such as {"unifiedreward": {"base_url": "http://..."}};
    docs/rewards.md has every scorer's options. "device" and "dtype" are among them where a scorer has a model."""
    reward_timeout: float = key("reward_timeout", 600.0, "(0, inf)", resume=FREE)
    """Seconds that a reward may take for one batch, waiting for its server included. Rewards that are trained on end
    the run after that (with several processes it must be below `collective_timeout`); in monitoring and evaluation
    the run goes on without them."""


COMMON = (
    RunSettings,
    WatchSettings,
    MemorySettings,
    BaseSettings,
    AlgorithmSettings,
    TaskSettings,
    BatchSettings,
    NoiseSettings,
    SamplerSettings,
    OptimizerSettings,
    LoraSettings,
    EmaSettings,
)
SCHEMA = Schema(*COMMON, *(group for cls in ALGORITHMS.values() for group in cls.groups), UpstreamSettings)
_COMMON_KEYS = frozenset(Schema(*COMMON).keys)


# What a task has that does not say so itself.
_TASK_DEFAULTS = {
    "guidance_scale": "sample.teacher_guidance_scale",
    "eval_guidance_scale": "sample.eval_guidance_scale",
    "eval_num_steps": "sample.eval_num_steps",
}


def base_config() -> ConfigDict:
    """A fresh copy of all defaults: what ``config/base.py`` returns."""
    return SCHEMA.config()


def load_config(source: str, overrides: Sequence[tuple[str, str | None]] = ()) -> ConfigDict:
    """:func:`diffusionopd.config_schema.load_config` with the keys of this project."""
    return config_schema.load_config(SCHEMA, source, overrides)


def with_paths(config: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
    """A configuration, as nested dicts, with its paths, also its tasks', as they lead from here.

    ``~`` is a home folder. A relative path is one from the current folder; what is not there to read is looked for in
    the project's.
    """
    found = placed(to_plain(config), SCHEMA.keys)
    for name in SECTIONS:
        if isinstance(section := found.get(name), Mapping):
            own = {key.removeprefix(f"{name}."): declared for key, declared in SCHEMA.keys.items()}
            found[name] = placed(section, own)
    tasks = found["train"].get("teachers") if isinstance(found.get("train"), Mapping) else None
    if isinstance(tasks, list | tuple):
        found["train"]["teachers"] = [placed(task, FIELDS) if isinstance(task, Mapping) else task for task in tasks]
    return found


def with_loras(config: ConfigDict) -> ConfigDict:
    """The configuration with ``train.teachers`` in the place of ``loras``, and a round of them; itself without any.

    Raises ConfigError with all that is wrong with the LoRAs' table.
    """
    values = flatten(config)
    if not (given := values.get("loras")):
        return config
    problems = Problems()
    if problem := SCHEMA.keys["loras"].problem(given):
        problems.add("loras", *problem)
    if values.get("train.teachers"):
        problems.add("loras", "is set, and so is train.teachers", "Leave one of them out.")
    if problems.found:
        raise ConfigError(problems.found)
    values["train.teachers"] = read_loras(given)
    made = config.copy_and_resolve_references()
    made.loras, made.train.teachers = None, values["train.teachers"]
    counts = {key.name: key for key in keys_of(BatchSettings).values()}
    if all(name in values and not key.problem(values[name]) for name, key in counts.items()):
        made.update_from_flattened_dict(fitted_round(values))
    return made


def with_model_values(config: ConfigDict) -> ConfigDict:
    """The configuration with what it leaves to the base model: None takes the default of the model's family.

    The small files of a model on the hub are fetched for that. A configuration that is wrong is left as it is, for
    :func:`check` to report.
    """
    values = flatten(with_paths(config))
    left = SCHEMA.left_to_model(values)
    own = keys_of(BaseSettings).values()
    if not left or any(key.name not in values or key.problem(values[key.name]) for key in own):
        return config
    try:
        model = read_model(**read(BaseSettings, values).source)
    except BackboneError:
        return config
    made = config.copy_and_resolve_references()
    made.update_from_flattened_dict({name: getattr(model.defaults, field) for name, field in left.items()})
    return made


def unsaved(values: Mapping[str, Any]) -> list[str]:
    """Keys without effect on this run that hold what cannot be saved: they are left at their defaults."""
    unused = (name for name in SCHEMA.keys if not is_used(name, values.get("train.algorithm", "")))
    return [name for name in unused if any(unwritable(values.get(name), name))]


def is_used(name: str, algorithm: str) -> bool:
    """Whether an algorithm reads a key."""
    cls = ALGORITHMS.get(algorithm) if isinstance(algorithm, str) else None
    return name in _COMMON_KEYS or (cls is not None and name in Schema(*cls.groups).keys)


def ema_repeats(values: Mapping[str, Any]) -> int:
    """`train.ema_repeats` of a checked flat configuration, with the published number for 0."""
    batches = read(BatchSettings, values)
    in_step = batches.gradient_accumulation_steps * batches.batch_size // batches.train_batch_size
    published = in_step if ALGORITHMS[values["train.algorithm"]].ema_each_batch else 1
    return values["train.ema_repeats"] or max(1, published)


@dataclass(frozen=True)
class Plan(RoundPlan):
    """A checked configuration and the counts that follow from it."""

    values: Mapping[str, Any]  # flat
    algorithm: type[Algorithm]
    run: RunSettings
    watch: WatchSettings
    num_prompts: tuple[int, ...]  # training prompts of each task
    notes: tuple[str, ...]  # settings that are accepted but change nothing
    teacher_models: Mapping[str, TeacherModel]  # by the tasks' `model`, those that are here

    @property
    def teachers(self) -> tuple[Task, ...]:
        """The tasks whose teachers are used: all or none."""
        return self.tasks if self.algorithm.uses_teachers(self.values) else ()

    def read(self, group: type[T]) -> T:
        """The settings of a group."""
        return read(group, self.values)

    @property
    def nfe_per_round(self) -> Nfe:
        """Forward passes of the transformer per round, over all processes."""
        return self.algorithm.count(self)

    def wants_scores(self, number: int) -> bool:
        """Whether the images of round ``number`` (from 1) are scored: the first's, every so many rounds, the last's."""
        return not self.algorithm.has_rewards and self._is_watched(number, self.watch.monitor_freq)

    def wants_grid(self, number: int) -> bool:
        """Whether the images of round ``number`` (from 1) become a grid."""
        return self._is_watched(number, self.watch.sample_freq)

    def _is_watched(self, number: int, every: int) -> bool:
        return every > 0 and (number in (1, self.shape.num_rounds) or number % every == 0)

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
        return f"at the start and every {self.watch.eval_freq} rounds{also}" if self.watch.eval_freq else ""

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
    "alternate": "each with one task, in turn",
    CASCADE: "each with one task, one after another",
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
    for name, field in SCHEMA.left_to_model(values).items():
        if model:
            values[name] = getattr(model.defaults, field)
        else:
            problems.add(name, "is None, the base model's own value, and the base is not here", "Set it.")
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
    if model:
        _check_fits(values, tasks, algorithm, model, problems)
    if model and problems.good("train.teachers"):
        _check_references(tasks, model, problems)
    own = _check_teacher_models(values, algorithm, model, problems) if sources else {}
    lora_notes = _check_loras(values, algorithm, model, own, problems) if sources else []
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
        algorithm.check(settings, sampler, values, problems)
    if algorithm.has_rewards and num_processes > 1:
        _check_timeouts(values, problems)
    if problems.found:
        raise ConfigError(problems.found)

    # The plan
    assert sampler and batches
    run, watch = read(RunSettings, values), read(WatchSettings, values)
    shape = round_shape(batches, len(tasks), num_processes, run.num_epochs, values["seed"])
    changed = [name for name, key in SCHEMA.keys.items() if comparable(values[name]) != comparable(key.default)]
    notes = [*sampler.notes(), *algorithm.notes(settings, changed), *lora_notes]
    if unused := sorted(name for name in changed if not is_used(name, algorithm.name)):
        what = "distillation" if algorithm.one_step else algorithm.name
        notes.insert(0, f"without effect on {what}: {', '.join(unused)}")
    if dropped := unsaved(values):
        places = (f"{what} at {place}" for name in dropped for place, what in unwritable(values[name], name))
        notes.append(f"left out of what is saved, being no values of JSON: {', '.join(places)}")
    if rest := shape.num_rounds % shape.rounds_per_step:
        notes.append(f"the last {rest} of num_epochs {shape.num_rounds} rounds end in no optimizer step")
    return Plan(settings, sampler, shape, tasks, model, values, algorithm, run, watch, num_prompts, tuple(notes), own)


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


def _check_references(tasks: Sequence[Task], model: ModelInfo, problems: Problems) -> None:
    """Prompts with an image are for a base that reads images."""
    for i, task in enumerate(tasks):
        if not problems.good(*(f"train.teachers[{i}].{name}" for name in ("dataset", "datasets", "prompt_fn"))):
            continue
        try:
            (first, *_), _ = load_folders(task.folders, task.prompt_fn, "train", 1)
        except PromptError as error:  # of folders that do not go together: each was looked at before
            problems.add(f"train.teachers[{i}].datasets", f"cannot be used together: {error}", "")
            continue
        if first.reference and not model.family.READS_IMAGES:
            what = f"has prompts with a {REFERENCE}, such as {first.source}, which the base model does not read"
            problems.add(f"train.teachers[{i}].dataset", what, "Set pretrained.model to an editing model.")


def _check_fits(
    values: Mapping[str, Any], tasks: Sequence[Task], algorithm: type[Algorithm], model: ModelInfo, problems: Problems
) -> None:
    """The resolution and every guidance are ones that the base model has."""
    if problems.good("resolution"):
        try:
            model.family.shape_of(values["resolution"], model.configs)
        except ValueError as error:
            problems.add("resolution", f"is {values['resolution']}: {error}", "")
    student = {"sample.guidance_scale": values["sample.guidance_scale"] if values["train.cfg"] is True else 1.0}
    fields = ["guidance_scale"] * algorithm.uses_teachers(values) + ["eval_guidance_scale"] * bool(values["eval_freq"])
    own = {f"train.teachers[{i}].{name}": getattr(task, name) for i, task in enumerate(tasks) for name in fields}
    for name, guidance in {**student, **own}.items():
        if problems.good(name, "train.teachers") and (problem := model.guidance_problem(guidance)):
            problems.add(name, f"is {guidance:g}, but {problem}", "Set it to 1.0.")
    if model.guidance == EMBEDDED and values["train.cfg"] is False:
        usual = f"{model.defaults.guidance_scale:g} is usual"
        what = "is False, which is guidance 1, but the base model has guidance as an input: it costs no second forward"
        problems.add(
            "train.cfg", what, f"Set it to True, and sample.guidance_scale to what the student is given; {usual}."
        )


def _teachers(values: Mapping[str, Any], algorithm: type[Algorithm], problems: Problems) -> list[tuple[str, Any]]:
    """Where each teacher that is used stands in the configuration, and its task."""
    if not (problems.good("train.teachers") and algorithm.uses_teachers(values)):
        return []
    entries = enumerate(values["train.teachers"])
    return [(f"train.teachers[{i}]", entry) for i, entry in entries if isinstance(entry, Mapping)]


def _own_model(place: str, task: Mapping[str, Any], problems: Problems) -> str:
    """The model of a teacher that has its own; else empty."""
    source = task.get("model")
    return source if isinstance(source, str) and not unset(source) and problems.good(f"{place}.model") else ""


def _check_teacher_models(
    values: Mapping[str, Any], algorithm: type[Algorithm], base: ModelInfo | None, problems: Problems
) -> dict[str, TeacherModel]:
    """What the files of teachers' own models say, of those that are here, beside a base that is here too."""
    found: dict[str, TeacherModel] = {}
    for place, task in _teachers(values, algorithm, problems):
        source = _own_model(place, task, problems)
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
    algorithm: type[Algorithm],
    base: ModelInfo | None,
    own: Mapping[str, TeacherModel],
    problems: Problems,
) -> list[str]:
    """What LoRAs that are here hold, and whether they fit the models that they are for, if here; returns notes."""
    sources: dict[str, dict[str, Any]] = {"": {"train.lora_path": values.get("train.lora_path")}}
    for place, task in _teachers(values, algorithm, problems):
        sources.setdefault(_own_model(place, task, problems), {})[f"{place}.lora_path"] = task.get("lora_path")
        sources[""][f"{place}.reference"] = task.get("reference")
    notes = []
    for source, named in sources.items():
        here = {key: s for key, s in named.items() if problems.good(key) and not unset(s) and Path(s).exists()}
        try:
            model = own.get(source) if source else base
            _, wrong, said = find_all(here, source or values.get("pretrained.model") or "", model)
        except BackboneError as error:
            problems.add("pretrained.model", f"cannot be used: {error}", "")
            return []
        for place, what in wrong.items():
            problems.add(place, f"cannot be used: {what}", "Leave it empty for the model itself." if source else "")
        notes += said
    return notes


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
    _check_start(values, problems)
    if values.get("train.use_8bit_adam") is True and find_spec("bitsandbytes") is None:
        problems.add("train.use_8bit_adam", "needs bitsandbytes", "pip install bitsandbytes, or set it to False.")


def _check_drawn_tasks(values: Mapping[str, Any], num_tasks: int, problems: Problems) -> None:
    name, drawn = "train.tasks_per_round", values["train.tasks_per_round"]
    if drawn and values["train.task_order"] != TOGETHER:
        remedy = f"Set it to 0, or train.task_order to {TOGETHER!r}."
        problems.add(name, f"is {drawn}, but train.task_order is {values['train.task_order']!r}", remedy)
    elif drawn > num_tasks:
        problems.add(name, f"is {drawn}, more than the {num_tasks} tasks", "Set it to 0 for all of them.")


def _check_start(values: Mapping[str, Any], problems: Problems) -> None:
    """A start from the teachers is the only start, and there are teachers."""
    name, algorithm = "train.student_init", ALGORITHMS.get(values["train.algorithm"])
    if values[name] != FROM_TEACHERS:
        return
    if not unset(values["train.lora_path"]):
        what = f"is {FROM_TEACHERS!r}, and train.lora_path names a start too"
        problems.add(name, what, f"Leave one of them out: set it to {FRESH!r}, or train.lora_path to None.")
    remedy = f"Set it to {FRESH!r}, or name a LoRA in train.lora_path."
    if algorithm and not algorithm.has_teachers:
        problems.add(name, f"is {FROM_TEACHERS!r}, but {algorithm.name} learns from rewards", remedy)
    elif algorithm:
        teachers = _teachers(values, algorithm, problems)
        others = [place for place, task in teachers if _own_model(place, task, problems)]
        if others:
            what = (
                f"is {FROM_TEACHERS!r}, but with a model of its own ({', '.join(others)}) no LoRA of the base is there"
            )
            problems.add(name, what, remedy)


def _find_runs(values: dict[str, Any], problems: Problems) -> None:
    """Put the checkpoint of it in the place of a run folder that a LoRA is to come from."""
    tasks = values["train.teachers"] if problems.good("train.teachers") else []
    named = [(f"train.teachers[{i}].", task) for i, task in enumerate(tasks) if isinstance(task, dict)]
    for place, holder in [("", values), *named]:
        name = "lora_path" if place else "train.lora_path"
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


def _count(number: int, what: str, plural: str = "s") -> str:
    return f"{number} {what}{'' if number == 1 else plural}"


def _guidance(scale: float) -> str:
    return "none (1.0)" if scale == 1.0 else f"{scale:g}"
