"""One run: build from a config, resume, loop over rounds, save."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration
from ml_collections import ConfigDict
from torch import Tensor
from tqdm import tqdm

from diffusionopd import distributed
from diffusionopd.algorithms.base import STUDENT, Parts, RoundResult
from diffusionopd.algorithms.optim import Ema
from diffusionopd.config_schema import RunPlan, Start, check, resumed
from diffusionopd.config_schema.values import is_number
from diffusionopd.data.batches import Batch, BatchMaker
from diffusionopd.evaluation.evaluate import evaluate_task
from diffusionopd.evaluation.sampling import ImageGenerator
from diffusionopd.failures import ending_together, memory_advice
from diffusionopd.files import ensure_writable, writing
from diffusionopd.models.backbone import DTYPES
from diffusionopd.models.text_cache import TextCache
from diffusionopd.rewards import REGISTRY, RewardError, Scores, check_options
from diffusionopd.stages import stage
from diffusionopd.training import checkpoint
from diffusionopd.training.agreement import agree, data_facts, setup_facts
from diffusionopd.training.learners import build_learner, build_optimizer
from diffusionopd.training.metrics import MetricsWriter
from diffusionopd.training.monitor import Monitor, Picture
from diffusionopd.training.prefetch import Rounds
from diffusionopd.training.resume import open_resume, prompt_digests, tensor_digest, weight_digests
from diffusionopd.training.setup import (
    build_evaluation_scorers,
    build_rewards,
    check_devices,
    fill_text_cache,
    find_sharding,
    load_models,
    merged_note,
    read_prompts,
)
from diffusionopd.training.state import (
    RunError,
    flat,
    load_state,
    save_state,
    write_json,
)
from diffusionopd.training.stop import Stop, read_pending, write_pending

ROUND_MEMORY = (
    "Lower train.batch_size (and raise train.gradient_accumulation_steps to match: the student that is trained is the "
    "same), or set activation_checkpointing; then go on with --config.resume_from=auto."
)
RUN_FOLDER = "Choose another with --config.save_dir, or free space."
EVALUATION_MEMORY = "Lower sample.test_batch_size; then go on with --config.resume_from=auto."


def make_accelerator(config: ConfigDict) -> Accelerator:
    """Processes and trackers. Mixed precision is the backbone's own (frozen half weights under autocast)."""
    seconds = config.collective_timeout
    if not is_number(seconds) or seconds <= 0:
        seconds = distributed.TIMEOUT  # for the moment that check() needs to refuse the configured one
    distributed.set_timeout(seconds)
    return Accelerator(
        mixed_precision="no",
        log_with=_trackers(config) or None,
        project_config=ProjectConfiguration(logging_dir="trackers"),  # moved into the run folder by train()
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=seconds))],
    )


def train(config: ConfigDict, *, dry_run: bool = False, allow_config_change: bool = False) -> Path | None:
    """Run ``config`` to its end and return the last checkpoint; with ``dry_run`` check and describe it only.

    ``allow_config_change`` resumes although the configuration describes another experiment than the checkpoint's.
    Raises ConfigError, EngineError, ResumeError, PromptError, FolderError, AdapterError, BackboneError or RunError
    before anything expensive, NonFiniteError, RewardError, OutOfMemoryError and CheckpointError during training;
    nothing saved before is touched by a failure. What fails in one process ends all of them.
    """
    find_sharding(config)  # before accelerate, which would name no remedy
    accelerator = make_accelerator(config)
    trainer: Trainer | None = None
    try:
        with ending_together():
            agree(setup_facts(config.to_dict()))
            start = resumed(config, accelerator.num_processes, allow_config_change)
            plan = check(start.config, accelerator.num_processes, REGISTRY)
            check_options(plan.reward_options)
            check_devices(config, accelerator.device)
            accelerator.project_configuration.project_dir = str(plan.run_dir)
            accelerator.project_configuration.logging_dir = str(plan.run_dir / "trackers")
            accelerator.print(plan.describe())
            if dry_run:
                accelerator.print("dry run: the configuration is complete and consistent, nothing was started")
                return None
            trainer = Trainer(start.config, plan, accelerator, start=start, allow_config_change=allow_config_change)
            return trainer.run()
    finally:
        if trainer is not None:
            trainer.close()


class Trainer:
    """Everything of one run. Building it loads the weights; :meth:`run` trains; :meth:`close` ends its threads."""

    def __init__(
        self,
        config: ConfigDict,
        plan: RunPlan,
        accelerator: Accelerator,
        *,
        start: Start | None = None,
        allow_config_change: bool = False,
    ) -> None:
        """``start`` where ``config`` was adapted to the number of processes."""
        self.config, self.plan, self.accelerator = config, plan, accelerator
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.is_main = accelerator.is_main_process
        self.device, self.dtype = accelerator.device, DTYPES[config.mixed_precision]
        if self.dtype == torch.float16 and self.device.type == "cpu":
            raise RunError("mixed_precision fp16 needs a GPU; on a CPU use --config.mixed_precision=no")
        # Matrix products and convolutions: torch has a switch for each, and that of convolutions is on by default.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.allow_tf32
        self._check_folders()
        self.start = start or Start(config, config, self.world)
        self.resume = open_resume(self.start, plan, allow_config_change)
        self.resumed_from = self.resume.folder if self.resume else None
        self.completed = self.resume.completed if self.resume else 0
        self._pending = read_pending(self.resumed_from)
        self._saved_after = 0  # rounds
        self.prompts = read_prompts(config, plan)
        agree(data_facts(self.resumed_from, train=self.prompts.train, test=self.prompts.test))
        self.digests = self._same_as_before(prompt_digests(self.prompts.train))
        self.rewards = build_rewards(plan, str(self.device), config.reward_timeout)
        self.text = self._encode_prompts()
        self.backbone, self.adapters = load_models(config, plan, dtype=self.dtype, device=self.device)
        weights = weight_digests(plan, self.backbone, self.adapters)
        agree({"weights": weights | {"the student": tensor_digest(self.adapters.parameters(STUDENT))}})
        self.digests |= self._same_as_before(weights)
        self.backbone.shard()
        self._build_batches()
        self._build_learner()
        if self.resumed_from is not None:
            load_state(self.resumed_from / "state", self.learner, self.ema)
        self._build_metrics()

    # --- build ---------------------------------------------------------------------------------------------------

    def _check_folders(self) -> None:
        if self.is_main:
            ensure_writable(self.plan.run_dir, "run folder", RUN_FOLDER)
        ensure_writable(self.config.cache_dir, "text cache", "Choose another with --config.cache_dir, or free space.")

    def _same_as_before(self, digests: dict[str, str]) -> dict[str, str]:
        """``digests``; RunError where the checkpoint that is resumed has other ones."""
        if self.resume is not None:
            self.resume.check_digests(digests)
        return digests

    def _encode_prompts(self) -> TextCache:
        texts = self.prompts.used_from(self.plan, self.completed)
        return fill_text_cache(
            self.config, texts, dtype=self.dtype, device=self.device, rank=self.rank, world=self.world
        )

    def _score(self, batch: Batch, latents: Tensor) -> Future[Scores]:
        """Scores to come of a batch's final latents, from a thread: the next batch is sampled meanwhile."""
        texts, metadata = [p.text for p in batch.prompts], [p.metadata for p in batch.prompts]
        return self.rewards[batch.task].submit(self.backbone.decode(latents), texts, metadata)

    def _build_batches(self) -> None:
        config = self.config
        maker = BatchMaker(
            self.plan,
            self.prompts.samplers,
            self.prompts.train,
            self.text,
            latent_shape=self.backbone.latent_shape(config.resolution),
            device=self.device,
            dtype=self.dtype,
            seed=config.seed,
            backward_size=config.train.batch_size,
            images_per_prompt=config.sample.num_image_per_prompt,
            same_latent=config.sample.same_latent,
            rank=self.rank,
            world=self.world,
        )
        self.rounds = Rounds(
            maker, watched=lambda index: any(self._looks(index)), end=config.num_epochs, ahead=config.prefetch
        )

    def _build_learner(self) -> None:
        train = self.config.train
        parameters = self.adapters.parameters(STUDENT)
        self.optimizer = build_optimizer(self.config, self.adapters, self.dtype)
        self.ema = Ema(parameters, train.ema_decay, train.ema_interval, train.fused_optimizer) if train.ema else None
        negative = self.text.get([""], self.device, self.dtype)
        parts = Parts(self.backbone, self.adapters, self.optimizer, negative)
        self.learner = build_learner(self.config, self.plan, parts, self._score)

    def _build_metrics(self) -> None:
        run_dir, config = self.plan.run_dir, self.config
        file = run_dir / "metrics.jsonl" if self.is_main else None
        with writing(run_dir, "run folder", RUN_FOLDER):
            self.metrics = MetricsWriter(file, _trackers(config), self.accelerator)
            # A round whose evaluation is still to be done is not written yet, or was by a sitting that crashed later.
            self.metrics.truncate_after(self.completed - (self._pending is not None))
            if self.is_main:
                write_json(run_dir / "config.json", self.start.given.to_dict())
        self.metrics.start_trackers(config.run_project, flat(config.to_dict()))
        # Rewards that are trained on are measured anyway.
        watched = bool(config.monitor_freq) and not self.plan.from_rewards
        rewards = {t.name: t.proxy_reward for t in self.plan.teachers} if watched else {}
        self.monitor = Monitor(
            # One at a time: the pictures are decoded beside the next round, and share its memory.
            partial(self.backbone.decode, chunk=1),
            rewards,
            run_dir / "samples",
            str(self.device),
            self.plan.reward_options,
            config.reward_timeout,
        )
        limit = config.reward_timeout
        self.scorers = build_evaluation_scorers(self.plan, str(self.device), limit) if config.eval_freq else {}
        self._held_row: dict[str, Any] | None = None

    # --- loop ----------------------------------------------------------------------------------------------------

    def run(self) -> Path | None:
        """Train to ``num_epochs`` rounds; returns the last checkpoint."""
        config = self.config
        resuming = f", {self.resume.describe()}" if self.resume else ""
        self.accelerator.print(f"writing to {self.plan.run_dir}" + resuming + merged_note(self.adapters))
        saved = self.resumed_from
        bar = tqdm(
            total=config.num_epochs, initial=self.completed, desc=self._verb(), unit="round", disable=not self.is_main
        )
        with bar, Stop(announce=self.is_main) as stop:
            for row in self._rounds(bar, stop):
                saved = self._end_round(row, stop) or saved
                if stop.agreed():
                    if self._saved_after != self.completed:  # it may have been time for it anyway
                        saved = self._save()
                    break
        self.accelerator.print(stop.note(self.completed, saved) if stop.signal else f"done: {saved}")
        return saved

    def _rounds(self, bar: tqdm, stop: Stop) -> Iterator[dict[str, Any]]:
        """The metrics of each round to do, first of one whose evaluation a signal cut short."""
        if self._pending is not None:
            yield self._pending
        while self.completed < self.config.num_epochs:
            stop.doing = f"round {self.completed + 1}"
            row = self.round(self.completed)
            self.completed += 1
            bar.update()
            shown = "reward/" if self.plan.from_rewards else "loss/"
            bar.set_postfix({k.removeprefix(shown): f"{v:.3g}" for k, v in row.items() if k.startswith(shown)})
            yield row

    def _end_round(self, row: dict[str, Any], stop: Stop) -> Path | None:
        """Evaluate and save where it is time to; the checkpoint if there is one."""
        if self._due(self.config.eval_freq):
            stop.doing = f"a batch of the evaluation after round {self.completed}"
            scores = self._evaluate(stop)
            if scores is None:
                return self._save(pending=row)
            row |= scores
        self._hold(row)
        if self._due(self.config.save_freq) or self.completed == self.config.num_epochs:
            return self._save()
        return None

    def close(self) -> None:
        """Write what is still held, end threads and trackers."""
        self.rounds.close()
        self.monitor.close()
        for worker in self.rewards.values():
            worker.close(cancel=True)
        for scorers in self.scorers.values():
            for scorer in scorers.values():
                scorer.close()
        self.metrics.close()
        self.accelerator.end_training()

    def round(self, index: int) -> dict[str, Any]:
        """Train round ``index`` (from 0); its metrics."""
        started, number = time.perf_counter(), index + 1
        score, grid = self._looks(index)
        updates = self.plan.updates_after(number)
        with stage("prompts and noise"):
            batches = self.rounds.batches(index)
        evaluations = self.backbone.evaluations
        with memory_advice(f"round {number}", ROUND_MEMORY):
            result = self.learner.round(batches, f"round {number}", step=updates is not None)
        result.metrics["evaluations"] = float((self.backbone.evaluations - evaluations) * self.world)
        with stage("metrics"):
            self._flush()
        if updates is not None:
            self.learner.finish(updates)
            if self.ema is not None:
                with stage("moving average"):
                    self.ema.update(updates)
        if result.pictures:
            name = Path(f"round-{number:06d}.png") if grid and self.is_main else None
            pictures = [Picture(batch.task, latents, batch.prompts) for batch, latents in result.pictures]
            with stage("monitoring"):
                self.monitor.watch(pictures, score=score, grid=name, title=f"pictures of round {number}")
        return self._row(number, batches, result, time.perf_counter() - started)

    def _looks(self, index: int) -> tuple[bool, bool]:
        """Whether the pictures of round ``index`` are scored, and whether they become a grid: the first's, every
        so many rounds, and the last's."""
        config, number = self.config, index + 1
        ends = number in (1, config.num_epochs)
        # Rewards that are trained on are measured anyway.
        score = config.monitor_freq and not self.plan.from_rewards and (ends or number % config.monitor_freq == 0)
        grid = config.sample_freq and (ends or number % config.sample_freq == 0)
        return bool(score), bool(grid)

    def _row(self, number: int, batches: list[Batch], result: RoundResult, seconds: float) -> dict[str, Any]:
        by_task = {
            name: [i for i, b in enumerate(batches) if b.task == name]
            for name in dict.fromkeys(b.task for b in batches)
        }
        return {
            "round": number,
            "loss": result.losses.mean().item(),
            **{f"loss/{task}": result.losses[rows].mean().item() for task, rows in by_task.items()},
            "grad_norm": result.grad_norm,
            "lr": self.optimizer.lr,
            "seconds": seconds,
            **result.metrics,
        }

    def _hold(self, row: dict[str, Any]) -> None:
        """Keep a round's metrics until its monitoring rewards, scored meanwhile, are there: one round later."""
        self._held_row = row

    def _flush(self) -> None:
        row, self._held_row = self._held_row, None
        scores = self.monitor.collect()
        if row is not None:
            self.metrics.write(row.pop("round"), **row, **scores)

    def _evaluate(self, stop: Stop) -> dict[str, float] | None:
        """Mean proxy rewards on the test prompts, with the weights that a checkpoint would hold; None when stopped."""
        config = self.config
        scores: dict[str, float] = {}
        own = {teacher.name: teacher for teacher in self.plan.teachers}
        with self._averaged(), self.adapters.using(STUDENT):
            for task, scorers in self.scorers.items():
                generate = ImageGenerator(
                    self.backbone,
                    self.text,
                    num_steps=own[task].eval_num_steps,
                    guidance_scale=own[task].eval_guidance_scale,
                    resolution=config.resolution,
                    seed=config.seed,
                )
                try:
                    with memory_advice(f"the evaluation on task {task!r}", EVALUATION_MEMORY):
                        means = evaluate_task(
                            generate,
                            self.prompts.test[task],
                            scorers,
                            batch_size=config.sample.test_batch_size,
                            rank=self.rank,
                            world=self.world,
                            in_step=self.backbone.sharding is not None,
                            stopped=stop.agreed,
                        )
                except RewardError as error:
                    if self.is_main:
                        warnings.warn(
                            f"training goes on without this evaluation on task {task!r}: {error}", stacklevel=2
                        )
                    continue
                if means is None:
                    return None
                scores |= {f"eval/{task}/{name}": value for name, value in means.items()}
        return scores

    def _verb(self) -> str:
        return "distilling" if self.plan.algorithm == "opd" else "training"

    def _due(self, every: int) -> bool:
        return every > 0 and self.completed % every == 0

    # --- state ---------------------------------------------------------------------------------------------------

    def _averaged(self) -> AbstractContextManager:
        return nullcontext() if self.ema is None else self.ema.in_use()

    def _save(self, pending: dict[str, Any] | None = None) -> Path:
        """A checkpoint after ``completed`` rounds; every process returns or raises together.

        ``pending`` are the metrics of a round that is still to be evaluated: they are kept in it, not written yet.
        """
        if pending is None:
            self._flush()
        else:
            pending |= self.monitor.collect()
        self.metrics.sync()
        root, name = self.plan.run_dir / "checkpoints", f"checkpoint-{self.completed}"
        protect = [self.resumed_from] if self.resumed_from else []
        limit = self.config.num_checkpoint_limit

        def save() -> None:
            if self.is_main:
                checkpoint.save(root, name, partial(self._write_checkpoint, pending=pending), limit, protect)

        distributed.together(save, "saving")
        self._saved_after = self.completed
        return root / name

    def _write_checkpoint(self, folder: Path, pending: dict[str, Any] | None) -> None:
        base = self.config.pretrained.model
        with self._averaged():
            self.adapters.save_peft(STUDENT, folder / "lora", base)
            self.adapters.save_diffusers(STUDENT, folder / "diffusers", base)
        origin = {"written_for": self.start.written_for, "digests": self.digests}
        save_state(folder / "state", self.learner, self.ema, self.completed, self.world, origin)
        write_json(folder / "config.json", self.start.given.to_dict())
        if pending is not None:
            write_pending(folder, pending)


def _trackers(config: ConfigDict) -> list[str]:
    return [name for name in config.log_with.split(",") if name and name != "none"]
