"""What a run is built from, before its first round: prompts, rewards, text embeddings, models, the algorithm."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import chain
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration
from ml_collections import ConfigDict

from diffusionopd.algorithms.base import Algorithm, Models
from diffusionopd.algorithms.optim import Ema, EmaSettings, OptimizerSettings, StudentOptimizer
from diffusionopd.config_schema import ConfigError, is_number
from diffusionopd.data.batches import Batches, NoiseSettings
from diffusionopd.data.prompts import Prompt, load_folders
from diffusionopd.data.sampler import PromptSampler
from diffusionopd.distributed import TIMEOUT, by_rank, gather_over_processes, set_timeout, together
from diffusionopd.failures import ending_together
from diffusionopd.files import ensure_writable, set_aside, write_json, writing
from diffusionopd.locks import Lock, hold
from diffusionopd.models.backbone import Backbone
from diffusionopd.models.conditions import NEGATIVE
from diffusionopd.models.loading import DTYPES, read_model
from diffusionopd.models.lora import Adapters
from diffusionopd.models.merged import MergedTeachers
from diffusionopd.models.policies import STUDENT, Policies
from diffusionopd.models.settings import FROM_TEACHERS, BaseSettings, LoraSettings, MemorySettings
from diffusionopd.models.sharding import requested_sharding
from diffusionopd.models.text_cache import TextCache
from diffusionopd.rewards import RewardError, RewardWorker, build_composite, build_scorer
from diffusionopd.training.agreement import agree, data_facts, setup_facts
from diffusionopd.training.checkpoint import folders, load_state, make_newest
from diffusionopd.training.checks import absent_rewards, check
from diffusionopd.training.collapse import Signs
from diffusionopd.training.describe import describe
from diffusionopd.training.digests import prompt_digests, tensor_digest, weight_digests
from diffusionopd.training.keys import ema_repeats, with_loras, with_model_values
from diffusionopd.training.loading import (
    check_devices,
    fill_text_cache,
    find_teacher_models,
    load_loras,
    load_models,
    load_teacher_models,
)
from diffusionopd.training.metrics import MetricsWriter
from diffusionopd.training.monitor import Monitor
from diffusionopd.training.passes import memory_lines, with_compile, with_passes
from diffusionopd.training.plan import Plan
from diffusionopd.training.resume import Resume, RunError, find_start
from diffusionopd.training.settings import tracker_names
from diffusionopd.training.start import choose_scale, start_from_teachers

_RUN_FOLDER = "Choose another with --config.save_dir, or free space."


@dataclass
class Run:
    """Everything that a run works with."""

    plan: Plan
    resume: Resume
    accelerator: Accelerator
    lock: Lock  # of the run folder
    algorithm: Algorithm
    batches: Batches
    optimizer: StudentOptimizer
    ema: Ema | None
    backbone: Backbone
    adapters: Adapters
    text: TextCache
    test: Mapping[str, Sequence[Prompt]]  # prompts by task; empty when nothing is evaluated
    test_parts: Mapping[str, Mapping[str, range]]  # by task and folder; empty for a task with one
    scorers: Mapping[str, Mapping[str, RewardWorker]]  # by task; of evaluations
    metrics: MetricsWriter
    monitor: Monitor
    signs: Signs
    base_norm: float  # of the matrices that the student adds to
    digests: Mapping[str, str]  # of prompts and weights
    held: dict[str, Any] | None = None  # the last round's metrics, until its monitored scores are there

    @property
    def is_main(self) -> bool:
        """Whether this process writes."""
        return self.accelerator.is_main_process

    def averaged(self) -> AbstractContextManager[None]:
        """The student's tensors are their moving averages inside the block, where there are any."""
        return self.ema.in_use() if self.ema else nullcontext()


@contextmanager
def started(config: ConfigDict, *, dry_run: bool = False, allow_config_change: bool = False) -> Iterator[Run | None]:
    """Check ``config``, say what it will do, and build the run; None with ``dry_run``.

    Errors and arguments as of :func:`diffusionopd.training.train`. What fails in one process inside the block ends all
    of them; after it, threads and trackers have ended.
    """
    requested_sharding()  # before accelerate, which would name no remedy
    config = with_loras(config)
    accelerator = make_accelerator(config)
    agree(setup_facts(config.to_dict()))
    config = together(partial(with_model_values, config), "reading the base model's defaults")
    look = partial(_plan, config, accelerator, allow_config_change)
    resume, plan = together(partial(look, held=False), "checking the configuration")
    if dry_run:
        plan = with_compile(plan, resume, accelerator.device)
        if plan.model or config.train.tasks_per_pass:
            plan = with_passes(plan, resume, accelerator.device)
        accelerator.print(describe(plan))
        for line in memory_lines(plan, accelerator.device) if accelerator.is_main_process else ():
            print(line)
        if plan.algorithm.has_rewards and (absent := absent_rewards(plan.tasks, plan.watch)):
            raise ConfigError(f"the run cannot start here: {what}" for what in absent)
        accelerator.print("dry run: the configuration is complete and consistent, nothing was started")
        yield None
        return
    with hold([plan.run.run_dir], "run folder", _RUN_FOLDER) as (lock,):
        # Again: until now another process may have written there, and a base of the hub was not known.
        source = plan.read(BaseSettings).source
        together(lambda: plan.model or read_model(**source), "reading the base model")
        resume, plan = together(partial(look, held=True), "checking the configuration")
        plan = with_passes(with_compile(plan, resume, accelerator.device), resume, accelerator.device)
        accelerator.print(describe(plan))
        accelerator.project_configuration.project_dir = str(plan.run.run_dir)
        accelerator.project_configuration.logging_dir = str(plan.run.run_dir / "trackers")
        # A failure is told first: closing waits for threads and ends the process group.
        with ExitStack() as closing, ending_together():
            yield build(plan, resume, accelerator, lock, closing)


def _plan(config: ConfigDict, accelerator: Accelerator, allow_config_change: bool, held: bool) -> tuple[Resume, Plan]:
    """Where the run starts, and what it will do: what is wrong is said here, before weights load."""
    resume = find_start(config, accelerator.num_processes, allow_config_change, held)
    plan = check(resume.config, accelerator.num_processes)
    check_devices(plan, accelerator.device)
    return resume, plan


def make_accelerator(config: ConfigDict) -> Accelerator:
    """Processes and trackers. Mixed precision is the backbone's own (frozen half weights, LoRAs in float32)."""
    seconds, log_with = config.get("collective_timeout"), config.get("log_with")
    if not is_number(seconds) or seconds <= 0:
        seconds = TIMEOUT  # until check() refuses the configured one
    set_timeout(seconds)
    return Accelerator(
        mixed_precision="no",
        log_with=tracker_names(log_with) or None,
        project_config=ProjectConfiguration(logging_dir="trackers"),  # moved into the run folder by started()
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=seconds))],
    )


def build(plan: Plan, resume: Resume, accelerator: Accelerator, lock: Lock, closing: ExitStack) -> Run:
    """Build everything; weights load here. Errors as of :func:`diffusionopd.training.train`.

    ``closing`` ends the threads and trackers, the last made first, and writes what is left.
    """
    memory, base = plan.read(MemorySettings), plan.read(BaseSettings)
    device, dtype = accelerator.device, DTYPES[memory.mixed_precision]
    if dtype == torch.float16 and device.type == "cpu":
        raise RunError("mixed_precision fp16 needs a GPU; on a CPU use --config.mixed_precision=no")
    # Matrix products and convolutions: torch has a switch for each, and that of convolutions is on by default.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = memory.allow_tf32
    if accelerator.is_main_process:
        ensure_writable(plan.run.run_dir, "run folder", _RUN_FOLDER)
    ensure_writable(memory.cache_dir, "text cache", "Choose another with --config.cache_dir, or free space.")

    # Prompts, and what is trained on them
    train, test, test_parts = _load_prompts(plan)
    noise = plan.read(NoiseSettings)
    samplers = {
        task.name: PromptSampler(train[task.name], noise.seed, index, plan.shape.groups_per_task)
        for index, task in enumerate(plan.tasks)
    }
    agree(data_facts(resume, train, test))
    digests = prompt_digests(train)
    resume.check_digests(digests)
    rewards = _build_rewards(plan, str(device), closing)
    models = find_teacher_models(plan)
    loras = load_loras(plan, models)

    # Text embeddings, then models: the encoders are gone from memory when the transformer comes
    texts, lora = [NEGATIVE], plan.read(LoraSettings)
    tries = resume.folder is None and lora.student_init == FROM_TEACHERS and not lora.student_init_scale
    for index, task in enumerate(plan.tasks):
        # Scales of a start are tried on the first round of every task, which need not visit them all.
        drawn = samplers[task.name].used_by(chain([0] * tries, plan.shape.rounds_of(index, resume.completed)))
        texts += [train[task.name][i].key for i in drawn] + [prompt.key for prompt in test.get(task.name, [])]
    text = fill_text_cache(plan, texts, device, dtype, accelerator.process_index, accelerator.num_processes)
    backbone, adapters = load_models(plan, device, dtype, loras)
    backbone.negative = text.get([NEGATIVE], device, dtype)
    merged = start_from_teachers(plan, adapters, loras, accelerator.print) if resume.folder is None else None
    others = load_teacher_models(plan, backbone, models, loras)
    policies = Policies(backbone, adapters, others, side_by_side=plan.shape.tasks_per_pass > 1)
    digests |= (weights := weight_digests(plan.teachers, policies))
    agree(weights | {"the student": tensor_digest(adapters.parameters(STUDENT))})
    resume.check_digests(weights)
    base_norm = adapters.base_norm(STUDENT)
    policies.shard()

    algorithm, optimizer, ema = _build_algorithm(plan, policies, rewards, dtype)
    optimizer.steps = plan.steps_after(resume.completed)
    if resume.folder is not None:
        restore(resume, optimizer, ema, algorithm)
    metrics = _open_metrics(plan, resume, accelerator, closing)
    scorers = _build_scorers(plan, accelerator, closing)
    monitor = _build_monitor(plan, backbone, str(device), closing)
    batches = Batches(
        plan.shape,
        plan.tasks,
        noise,
        prompts=train,
        samplers=samplers,
        text=text,
        latent_shape=backbone.latent_shape(base.resolution),
        steps=lambda index, task: plan.algorithm.steps(plan, (noise.seed, index, task)),
        wants_images=lambda index: plan.wants_scores(index + 1) or plan.wants_grid(index + 1),
        device=device,
        dtype=dtype,
        rank=accelerator.process_index,
    )
    closing.callback(batches.close)
    if merged and tries:
        choose_scale(algorithm, batches, merged, accelerator.print)
        if ema is not None:
            ema.load([p.detach() for p in optimizer.parameters])
    return Run(
        plan=plan, resume=resume, accelerator=accelerator, lock=lock, algorithm=algorithm, batches=batches,
        optimizer=optimizer, ema=ema, backbone=backbone, adapters=adapters, text=text, test=test, test_parts=test_parts,
        scorers=scorers, metrics=metrics, monitor=monitor, signs=Signs(resume.diversity), base_norm=base_norm,
        digests=digests,
    )  # fmt: skip


def merged_note(adapters: Adapters) -> str:
    """What merged teachers take, for the line that a run begins with; empty without any."""
    if not isinstance(adapters, MergedTeachers):
        return ""
    sizes = adapters.merged_bytes().values()
    return f", {len(sizes)} merged teachers in {sum(sizes) / 1e9:.3g} GB"


def restore(resume: Resume, optimizer: StudentOptimizer, ema: Ema | None, algorithm: Algorithm) -> None:
    """Put back what a checkpoint's state holds. RunError for a student of other shapes, or another kind of state."""
    assert resume.folder is not None
    folder = resume.folder / "state"
    tensors, scalars = load_state(folder)
    student = [tensor for name, tensor in tensors.items() if name.startswith("student.")]
    student = [tensors[f"student.{i}"] for i in range(len(student)) if f"student.{i}" in tensors]
    if [p.shape for p in student] != [p.shape for p in optimizer.parameters]:
        raise RunError(f"{folder} holds a student of another rank, target set or base; it cannot be resumed here")
    try:
        with torch.no_grad():
            for parameter, saved in zip(optimizer.parameters, student, strict=True):
                parameter.copy_(saved)
        if ema is not None:  # a run that had no EMA until now starts its average from the student
            ema.load([tensors.get(f"ema.{i}", saved) for i, saved in enumerate(student)])
        own = {name: tensor for name, tensor in tensors.items() if name.startswith("optimizer.")}
        optimizer.load_state(own, scalars["scaler"])
        algorithm.load_state(tensors)
    except (ValueError, LookupError, TypeError, RuntimeError, AttributeError) as error:
        raise RunError(
            f"{folder} is not the state of such a run ({error!r}); resume from another checkpoint"
        ) from error


def _load_prompts(
    plan: Plan,
) -> tuple[dict[str, list[Prompt]], dict[str, list[Prompt]], dict[str, dict[str, range]]]:
    """Prompts by task, of training and of evaluations, and which of the latter are whose folder's; if any."""
    train = {
        task.name: load_folders(task.folders, task.prompt_fn, "train", trigger=task.trigger)[0] for task in plan.tasks
    }
    test, parts = {}, {}
    for task in (task for task in plan.tasks if plan.watch.eval_freq and task.proxy_reward):
        most = plan.watch.eval_num_prompts or None
        test[task.name], places = load_folders(task.folders, task.prompt_fn, "test", most, task.trigger)
        parts[task.name] = places if len(places) > 1 else {}
    return train, test, parts


def _build_algorithm(
    plan: Plan, policies: Policies, rewards: Mapping[str, RewardWorker], dtype: torch.dtype
) -> tuple[Algorithm, StudentOptimizer, Ema | None]:
    """The algorithm, what it optimizes with, and the student's moving average if there is one."""
    optimization, average = plan.read(OptimizerSettings), plan.read(EmaSettings)
    parameters, ema = policies.adapters.parameters(STUDENT), None
    if average.ema:
        repeats = ema_repeats(plan.values)
        ema = Ema(parameters, average.ema_decay, average.ema_interval, repeats, optimization.fused_optimizer)
    optimizer = StudentOptimizer(
        parameters,
        optimization,
        dynamic_scale=dtype == torch.float16,
        num_steps=plan.steps_after(plan.shape.num_rounds),
        ema=ema,
    )
    algorithm = plan.algorithm(
        Models(policies, optimizer, rewards),
        plan.settings,
        plan.sampler,
        policies.backbone.sigmas(plan.sampler.num_steps, plan.read(BaseSettings).resolution, plan.sampler.schedule),
        plan.shape,
    )
    return algorithm, optimizer, ema


def _open_metrics(plan: Plan, resume: Resume, accelerator: Accelerator, closing: ExitStack) -> MetricsWriter:
    """The metrics of the rounds that are kept, and the trackers; the run folder's configuration is written."""
    run_dir, is_main = plan.run.run_dir, accelerator.is_main_process
    with writing(run_dir, "run folder", _RUN_FOLDER):
        if is_main and resume.folder and resume.folder.resolve().parent == (run_dir / "checkpoints").resolve():
            make_newest(resume.folder)  # before the metrics of what was saved later go
        if is_main and not folders(run_dir / "checkpoints"):  # of a start that never came to save one
            kept = [aside for name in ("metrics.jsonl", "config.json") if (aside := set_aside(run_dir / name))]
            if kept:
                what = f"an earlier start left no checkpoint; kept of it: {', '.join(map(str, kept))}"
                warnings.warn(what, stacklevel=2)
        metrics = MetricsWriter(run_dir / "metrics.jsonl" if is_main else None, plan.run.trackers, accelerator)
        # A round whose evaluation is still to be done is not written yet, or was by a run that crashed later; so is
        # that of the start, which is round 0.
        to_evaluate = resume.folder is None or resume.unevaluated is not None
        metrics.truncate_after(resume.completed - to_evaluate)
        if is_main:
            write_json(run_dir / "config.json", resume.given.to_dict())
    closing.callback(accelerator.end_training)
    closing.callback(metrics.close)
    # What is no plain value becomes text.
    shown = {name: v if isinstance(v, int | float | str) else str(v) for name, v in plan.values.items()}
    metrics.start_trackers(plan.run.run_project, plan.run.run_name or run_dir.name, shown)
    return metrics


def _build_monitor(plan: Plan, backbone: Backbone, device: str, closing: ExitStack) -> Monitor:
    """Scores images of training and draws them; rewards that are trained on are measured anyway."""
    watch = plan.watch
    scored = watch.monitor_freq > 0 and not plan.algorithm.has_rewards
    monitor = Monitor(
        backbone.decode,
        {task.name: task.proxy_reward if scored else {} for task in plan.tasks},
        plan.run.run_dir / "samples",
        device,
        watch.reward_options,
        watch.reward_timeout,
    )
    closing.callback(monitor.close)
    return monitor


def _build_rewards(plan: Plan, device: str, closing: ExitStack) -> dict[str, RewardWorker]:
    """The rewards that are trained on, by task, before any weight is loaded; RewardError for one that cannot be had."""
    workers, watch = {}, plan.watch
    for task in plan.tasks if plan.algorithm.has_rewards else ():
        scorer = build_composite(task.proxy_reward, device, watch.reward_options)
        name = ", ".join(task.proxy_reward)
        worker = RewardWorker(scorer, name=name, timeout=watch.reward_timeout, retry_unavailable=True)
        closing.callback(worker.close, cancel=True)
        workers[task.name] = worker
    return workers


def _build_scorers(plan: Plan, accelerator: Accelerator, closing: ExitStack) -> dict[str, dict[str, RewardWorker]]:
    """By task its proxy rewards, for evaluations; one that a process cannot have is said and left out. Collective."""
    scorers: dict[str, dict[str, RewardWorker]] = {}
    for task in plan.tasks if plan.watch.eval_freq else ():
        for name in task.proxy_reward:
            failure = ""
            try:
                scorer = build_scorer(name, str(accelerator.device), plan.watch.reward_options.get(name))
            except RewardError as error:
                failure = str(error)
            if failures := by_rank(gather_over_processes([failure])):
                if accelerator.is_main_process:
                    warnings.warn(f"task {task.name!r} is trained without evaluating {name}: {failures}", stacklevel=2)
                continue
            worker = RewardWorker(scorer, 1, name=name, timeout=plan.watch.reward_timeout)
            closing.callback(worker.close, cancel=True)
            scorers.setdefault(task.name, {})[name] = worker
    return scorers
