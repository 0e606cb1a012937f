"""A run from its first round to its last: batches, round, log, monitor, evaluate, save, stop."""

from __future__ import annotations

import time
import warnings
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration
from ml_collections import ConfigDict
from torch.profiler import record_function
from tqdm import tqdm

from diffusionopd.algorithms.base import Result
from diffusionopd.config_schema import is_number
from diffusionopd.distributed import TIMEOUT, set_timeout, together
from diffusionopd.evaluation.evaluate import ImageGenerator, evaluate_task
from diffusionopd.failures import ending_together, memory_advice
from diffusionopd.files import write_json
from diffusionopd.models.policies import STUDENT
from diffusionopd.models.settings import BaseSettings
from diffusionopd.rewards import RewardError
from diffusionopd.training import checkpoint
from diffusionopd.training.agreement import agree, setup_facts
from diffusionopd.training.monitor import Picture
from diffusionopd.training.plan import check
from diffusionopd.training.resume import find_start, versions
from diffusionopd.training.setup import Run, build, check_devices, merged_note
from diffusionopd.training.stop import Stop

_ROUND_MEMORY = (
    "Lower train.batch_size (and raise train.gradient_accumulation_steps to match: the student that is trained is the "
    "same), or set activation_checkpointing; then go on with --config.resume_from=auto."
)
_EVALUATION_MEMORY = "Lower sample.test_batch_size; then go on with --config.resume_from=auto."


def train(config: ConfigDict, *, dry_run: bool = False, allow_config_change: bool = False) -> Path | None:
    """Run ``config`` to its end and return the last checkpoint; with ``dry_run`` check and describe it only.

    ``allow_config_change`` resumes although the configuration describes another experiment than the checkpoint's.
    Raises ConfigError, EngineError, ResumeError, PromptError, FolderError, AdapterError, BackboneError or RunError
    before anything expensive, NonFiniteError, RewardError, OutOfMemoryError and CheckpointError during training;
    nothing saved before is touched by a failure. What fails in one process ends all of them.
    """
    accelerator = make_accelerator(config)
    with ending_together():
        # --- everything that can be said before weights load
        agree(setup_facts(config.to_dict()))
        start = find_start(config, accelerator.num_processes, allow_config_change)
        plan = check(start.config, accelerator.num_processes)
        check_devices(plan, accelerator.device)
        accelerator.print(plan.describe())
        if dry_run:
            accelerator.print("dry run: the configuration is complete and consistent, nothing was started")
            return None
        accelerator.project_configuration.project_dir = str(plan.run.run_dir)
        accelerator.project_configuration.logging_dir = str(plan.run.run_dir / "trackers")

        run = build(plan, start, accelerator)
        shape, watch, algorithm = plan.shape, plan.watch, run.algorithm
        resuming = start.describe() and f", {start.describe()}"
        accelerator.print(f"writing to {plan.run.run_dir}{resuming}{merged_note(run.adapters)}")
        completed, saved, saved_after = start.completed, start.folder, 0
        row = start.unevaluated  # the metrics of a round; first those of one whose evaluation was interrupted
        bar = tqdm(
            total=shape.num_rounds, initial=completed, desc=algorithm.verb, unit="round", disable=not run.is_main
        )
        try:
            with bar, Stop(announce=run.is_main) as stop:
                while row is not None or completed < shape.num_rounds:
                    if row is None:
                        # --- batches, and a round on them
                        started, number = time.perf_counter(), completed + 1
                        stop.doing = f"round {number}"
                        updates = shape.updates_after(number)
                        with record_function("prompts and noise"):
                            batches = run.batches.round(completed)
                        evaluations = run.backbone.evaluations
                        with memory_advice(f"round {number}", _ROUND_MEMORY), _named(number):
                            result = algorithm.round(batches, step=updates is not None)
                        if updates is not None:
                            algorithm.finish(updates)
                            if run.ema is not None:
                                run.ema.update(updates)
                        completed = number

                        # --- log; monitored scores of a round arrive while the next one trains
                        _flush(run)
                        evaluations = (run.backbone.evaluations - evaluations) * shape.num_processes
                        row = _row(run, number, result, evaluations, time.perf_counter() - started)
                        _watch(run, number, result)
                        _show(bar, row, "reward/" if plan.algorithm.has_rewards else "loss/")

                    # --- evaluate
                    if watch.eval_freq and completed % watch.eval_freq == 0:
                        stop.doing = f"a batch of the evaluation after round {completed}"
                        scores = _evaluate(run, stop)
                        if scores is None:  # the resumed run evaluates, and then writes the row
                            saved = _save(run, completed, row | run.monitor.collect())
                            break
                        row |= scores
                    run.held, row = row, None

                    # --- save, stop
                    if plan.run.save_freq and completed % plan.run.save_freq == 0 or completed == shape.num_rounds:
                        saved, saved_after = _save(run, completed), completed
                    if stop.agreed():
                        if saved_after != completed:
                            saved = _save(run, completed)
                        break
        finally:
            run.close()
            accelerator.end_training()
        accelerator.print(stop.note(completed, saved) if stop.signal else f"done: {saved}")
    if stop.signal:
        raise SystemExit(stop.STATUS)
    return saved


def make_accelerator(config: ConfigDict) -> Accelerator:
    """Processes and trackers. Mixed precision is the backbone's own (frozen half weights under autocast)."""
    seconds, log_with = config.get("collective_timeout"), config.get("log_with")
    if not is_number(seconds) or seconds <= 0:
        seconds = TIMEOUT  # until check() refuses the configured one
    set_timeout(seconds)
    trackers = [name for name in str(log_with or "").split(",") if name and name != "none"]
    return Accelerator(
        mixed_precision="no",
        log_with=trackers or None,
        project_config=ProjectConfiguration(logging_dir="trackers"),  # moved into the run folder by train()
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=seconds))],
    )


class _named:  # noqa: N801 - a context manager
    """Errors that leave the block name the round."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            error.add_note(f"in round {self.number}")


def _row(run: Run, number: int, result: Result, evaluations: int, seconds: float) -> dict[str, Any]:
    """The metrics of a round."""
    assert result.losses is not None
    return {
        "round": number,
        "loss": result.losses.mean,
        **{f"loss/{task}": loss for task, loss in result.losses.means().items()},
        "grad_norm": result.grad_norm,
        "lr": run.optimizer.lr,
        "seconds": seconds,
        **result.metrics,
        "evaluations": float(evaluations),
    }


def _flush(run: Run) -> None:
    """Write the last round's metrics, which waited for its monitored scores."""
    row, run.held = run.held, None
    scores = run.monitor.collect()
    if row is not None:
        run.metrics.write(row.pop("round"), **row, **scores)


def _watch(run: Run, number: int, result: Result) -> None:
    """Hand the round's images to the monitor, which does not keep the training waiting."""
    if not result.images:
        return
    pictures = [
        Picture(task, latents[rows], [row.prompt for row in batch.rows[rows]])
        for batch, latents in result.images
        for task, rows in batch.slices.items()
    ]
    grid = Path(f"round-{number:06d}.png") if run.plan.wants_grid(number) and run.is_main else None
    with record_function("monitoring"):
        run.monitor.watch(pictures, score=run.plan.wants_scores(number), grid=grid, title=f"images of round {number}")


def _show(bar: tqdm, row: dict[str, Any], prefix: str) -> None:
    bar.update()
    bar.set_postfix({k.removeprefix(prefix): f"{v:.3g}" for k, v in row.items() if k.startswith(prefix)})


def _evaluate(run: Run, stop: Stop) -> dict[str, float] | None:
    """Mean proxy rewards on the test prompts, with the weights that a checkpoint would hold; None when stopped."""
    scores: dict[str, float] = {}
    tasks = {task.name: task for task in run.plan.tasks}
    with run.averaged(), run.adapters.using(STUDENT):
        for name, scorers in run.scorers.items():
            generate = ImageGenerator(
                run.backbone,
                run.text,
                num_steps=tasks[name].eval_num_steps,
                guidance_scale=tasks[name].eval_guidance_scale,
                resolution=run.plan.read(BaseSettings).resolution,
                seed=run.plan.values["seed"],
            )
            try:
                with memory_advice(f"the evaluation on task {name!r}", _EVALUATION_MEMORY):
                    means = evaluate_task(
                        generate,
                        run.test[name],
                        scorers,
                        batch_size=run.plan.watch.test_batch_size,
                        rank=run.accelerator.process_index,
                        world=run.plan.shape.num_processes,
                        in_step=run.backbone.sharding is not None,
                        stopped=stop.agreed,
                    )
            except RewardError as error:
                if run.is_main:
                    warnings.warn(f"training goes on without this evaluation on task {name!r}: {error}", stacklevel=2)
                continue
            if means is None:
                return None
            scores |= {f"eval/{name}/{reward}": mean for reward, mean in means.items()}
    return scores


def _save(run: Run, completed: int, unevaluated: dict[str, Any] | None = None) -> Path:
    """A checkpoint after ``completed`` rounds; every process returns or raises together.

    ``unevaluated``: the metrics of a round that is still to be evaluated; they are kept in it, not written yet.
    """
    if unevaluated is None:
        _flush(run)
    run.metrics.sync()
    root, name = run.plan.run.run_dir / "checkpoints", f"checkpoint-{completed}"
    protect = [run.resume.folder] if run.resume.folder else []
    write = partial(_write_checkpoint, run, completed, unevaluated)

    def save() -> None:
        if run.is_main:
            checkpoint.save(root, name, write, run.plan.run.num_checkpoint_limit, protect)

    together(save, "saving")
    return root / name


def _write_checkpoint(run: Run, completed: int, unevaluated: dict[str, Any] | None, folder: Path) -> None:
    """All that a checkpoint is. Noise is a function of counters, so there is no generator's state."""
    base = run.plan.values["pretrained.model"]
    with run.averaged():
        run.adapters.save_peft(STUDENT, folder / "lora", base)
        run.adapters.save_diffusers(STUDENT, folder / "diffusers", base)
    tensors = {
        **{f"student.{i}": p for i, p in enumerate(run.optimizer.parameters)},
        **{f"ema.{i}": p for i, p in enumerate(run.ema.shadow if run.ema else [])},
        **run.optimizer.state_tensors(),
        **run.algorithm.state(),
    }
    scalars = {
        "round": completed,
        "num_processes": run.plan.shape.num_processes,
        "written_for": run.resume.written_for,
        "scaler": run.optimizer.state_scalars(),
        "versions": versions(),
        "digests": dict(run.digests),
        "unevaluated": unevaluated,
    }
    checkpoint.save_state(folder / "state", tensors, scalars)
    write_json(folder / "config.json", run.resume.given.to_dict())
