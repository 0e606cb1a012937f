"""A run from its first round to its last: batches, round, log, monitor, evaluate, save, stop."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from tqdm import tqdm

from diffusionopd.algorithms.results import Result
from diffusionopd.distributed import together
from diffusionopd.evaluation.evaluate import evaluate_task
from diffusionopd.evaluation.sampling import ImageGenerator
from diffusionopd.files import write_json
from diffusionopd.models.acceleration import no_new_graphs
from diffusionopd.models.policies import STUDENT
from diffusionopd.models.settings import BaseSettings
from diffusionopd.rewards import RewardError
from diffusionopd.stages import stage
from diffusionopd.training import checkpoint
from diffusionopd.training.digests import versions
from diffusionopd.training.memory import ROUND_MEMORY, memory_advice
from diffusionopd.training.monitor import MonitoredBatch
from diffusionopd.training.setup import Run, merged_note, started
from diffusionopd.training.stop import Stop, Stopped

_EVALUATION_MEMORY = "Lower sample.test_batch_size; then go on with --config.resume_from=auto."


def train(config: ConfigDict, *, dry_run: bool = False, allow_config_change: bool = False) -> Path | None:
    """Run ``config`` to its end and return the last checkpoint; with ``dry_run`` check and describe it only.

    ``allow_config_change`` resumes although the configuration describes another experiment than the checkpoint's.
    Raises ConfigError, EngineError, ResumeError, PromptError, FolderError, AdapterError, BackboneError or RunError
    before anything expensive, NonFiniteError, RewardError, OutOfMemoryError and CheckpointError during training;
    nothing saved before is touched by a failure. What fails in one process ends all of them. Raises Stopped, after
    saving, when a signal ended the run early.
    """
    with started(config, dry_run=dry_run, allow_config_change=allow_config_change) as run:
        if run is None:
            return None
        plan, shape, algorithm, resume = run.plan, run.plan.shape, run.algorithm, run.resume
        resuming = f", {resume.describe()}" if resume.folder else ""
        run.accelerator.print(f"writing to {plan.run.run_dir}{resuming}{merged_note(run.adapters)}")
        completed, saved, saved_after = resume.completed, resume.folder, -1
        # The metrics of a round; at first of one whose evaluation was interrupted, or of the start, as round 0.
        row = resume.unevaluated
        if plan.watch.eval_freq and resume.folder is None:
            row = {"round": 0}
        with _bar(run, completed) as bar, Stop(announce=run.is_main) as stop:
            while row is not None or completed < shape.num_rounds:
                if row is None:
                    # --- batches, and a round on them
                    start, number = time.perf_counter(), completed + 1
                    stop.doing = f"round {number}"
                    nfe = algorithm.policies.nfe
                    result = train_round(run, number)
                    completed = number

                    # --- log; monitored scores arrive while the next round trains
                    _flush(run)
                    nfe = (algorithm.policies.nfe - nfe) * shape.num_processes
                    row = _row(run, number, result, nfe, time.perf_counter() - start)
                    _monitor(run, number, result)
                    _show(bar, row, "reward/" if algorithm.has_rewards else "loss/")

                # --- evaluate
                if _is_due(plan.watch.eval_freq, completed):
                    when = f"after round {completed}" if completed else "before round 1"
                    stop.doing = f"a batch of the evaluation {when}"
                    scores = _evaluate(run, stop)
                    if scores is None:  # the resumed run evaluates, and then writes the row
                        saved = _save(run, completed, row | run.monitor.collect())
                        break
                    row |= scores
                run.held, row = row, None
                if not completed:
                    _flush(run)

                # --- save, stop
                last = completed == shape.num_rounds
                if last or (completed and _is_due(plan.run.save_freq, completed)):
                    saved, saved_after = _save(run, completed), completed
                if not last and stop.agreed():  # after the last round there is nothing to go on with
                    if saved_after != completed:
                        saved = _save(run, completed)
                    break
        run.accelerator.print(stop.note(completed, saved) if stop.signal else f"done: {saved}")
    if stop.signal:
        raise Stopped(saved)
    return saved


def train_round(run: Run, number: int) -> Result:
    """Round ``number`` (from 1): its batches, a round on them, and what follows an optimizer step."""
    updates, what = run.plan.shape.updates_after(number), f"round {number}"
    with stage("prompts and noise"):
        batches = run.batches.round(number - 1)
    with memory_advice(what, ROUND_MEMORY), _noted(what):
        result = run.algorithm.round(batches, step=updates is not None)
    if updates is not None:
        run.algorithm.finish(updates)
    return result


@contextmanager
def _noted(what: str) -> Iterator[None]:
    """Errors that leave the block say ``what`` was done."""
    try:
        yield
    except Exception as error:
        error.add_note(f"in {what}")
        raise


def _is_due(every: int, completed: int) -> bool:
    return every > 0 and completed % every == 0


def _bar(run: Run, completed: int) -> tqdm:
    total, verb = run.plan.shape.num_rounds, run.algorithm.verb
    return tqdm(total=total, initial=completed, desc=verb, unit="round", disable=not run.is_main)


def _row(run: Run, number: int, result: Result, nfe: int, seconds: float) -> dict[str, Any]:
    """The metrics of a round."""
    assert result.losses is not None
    return {
        "round": number,
        "loss": result.losses.mean,
        **{f"loss/{task}": loss for task, loss in result.losses.means().items()},
        "grad_norm": result.grad_norm,
        "lr": run.optimizer.lr,
        "lora_norm": run.adapters.added_norm(STUDENT) / run.base_norm,
        "seconds": seconds,
        **result.metrics,
        "evaluations": float(nfe),
    }


def _flush(run: Run) -> None:
    """Write the last round's metrics, which waited for its monitored scores."""
    row, run.held = run.held, None
    scores = run.monitor.collect()
    if row is None:
        return
    if run.is_main:
        run.lock.check()
    row |= scores
    shown = run.plan.run.log_images and run.plan.wants_grid(row["round"])
    run.metrics.write(row, run.plan.run.run_dir / "samples" / _grid_of(row["round"]) if shown else None)
    for sign in run.signs.of(row):
        if run.is_main:
            warnings.warn(f"round {row['round']}: {sign}; look at the samples, lower the learning rate", stacklevel=2)


def _grid_of(number: int) -> str:
    """Name of the file with the images of a round."""
    return f"round-{number:06d}.png"


def _monitor(run: Run, number: int, result: Result) -> None:
    """Hand the round's images to the monitor, which does not keep the training waiting."""
    monitored = [
        MonitoredBatch(task, latents[rows], [row.prompt for row in batch.rows[rows]])
        for batch, latents in result.images
        for task, rows in batch.slices.items()
    ]
    if monitored:
        grid = _grid_of(number) if run.plan.wants_grid(number) and run.is_main else ""
        with stage("monitoring"):
            scored = run.plan.wants_scores(number)
            run.monitor.watch(monitored, score=scored, grid=grid, title=f"images of round {number}")


def _show(bar: tqdm, row: dict[str, Any], prefix: str) -> None:
    bar.update()
    bar.set_postfix({k.removeprefix(prefix): f"{v:.3g}" for k, v in row.items() if k.startswith(prefix)})


def _evaluate(run: Run, stop: Stop) -> dict[str, float] | None:
    """Mean proxy rewards on the test prompts, with the weights that a checkpoint would hold; None when stopped."""
    scores: dict[str, float] = {}
    tasks = {task.name: task for task in run.plan.tasks}
    variants = {"": {}, **{f"@{name}": own for name, own in run.plan.watch.eval_variants.items()}}
    graphs = no_new_graphs() if run.plan.values["compile"] else nullcontext()
    with graphs, run.averaged(), run.adapters.using(STUDENT):
        for (name, scorers), (variant, own) in product(run.scorers.items(), variants.items()):
            generate = ImageGenerator(
                run.backbone,
                run.text,
                num_steps=own.get("num_steps", tasks[name].eval_num_steps),
                guidance_scale=own.get("guidance_scale", tasks[name].eval_guidance_scale),
                resolution=run.plan.read(BaseSettings).resolution,
                seed=run.plan.values["seed"],
            )
            try:
                with memory_advice(f"the evaluation on task {name!r}", _EVALUATION_MEMORY):
                    means = evaluate_task(
                        generate,
                        run.test[name],
                        scorers,
                        batch_size=run.backbone.in_step(run.plan.watch.test_batch_size),
                        rank=run.accelerator.process_index,
                        world=run.plan.shape.num_processes,
                        in_step=run.backbone.sharding is not None,
                        parts=run.test_parts[name],
                        stopped=stop.agreed,
                    )
            except RewardError as error:
                if run.is_main:
                    warnings.warn(f"training goes on without this evaluation on task {name!r}: {error}", stacklevel=2)
                continue
            if means is None:
                return None
            scores |= {f"eval/{name}{variant}/{reward}": mean for reward, mean in means.items()}
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
            run.lock.check()
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
        "tasks_per_pass": run.plan.shape.tasks_per_pass,
        "compiled": run.plan.values["compile"],
        "scaler": run.optimizer.state_scalars(),
        "versions": versions(),
        "digests": dict(run.digests),
        "unevaluated": unevaluated,
        "diversity": run.signs.first,
    }
    checkpoint.save_state(folder / "state", tensors, scalars)
    write_json(folder / "config.json", run.resume.given.to_dict())
