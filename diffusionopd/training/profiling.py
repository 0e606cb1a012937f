"""Where a round's time goes: undisturbed time, stages one by one, and a trace for Perfetto or chrome://tracing."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import torch
from ml_collections import ConfigDict
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from tqdm import tqdm

from diffusionopd.config_schema import check
from diffusionopd.rewards import REGISTRY
from diffusionopd.stages import timed_stages
from diffusionopd.training.loop import Trainer, make_accelerator

OTHER = "everything else"


@dataclass(frozen=True)
class Profile:
    """Seconds of a median round; of this process."""

    round_seconds: float  # undisturbed
    stage_seconds: dict[str, float]  # stages one after the other, longest first, and the rest of the round
    peak_bytes: int | None  # of GPU memory, None without a GPU
    rounds: int
    machine: str
    operators: str = ""  # torch's table of the dearest operators
    kernel_seconds: float | None = None  # that the GPU computes in a round; the rest of the round it waits for launches
    kernels: int | None = None  # that it is given in a round

    @property
    def staged_seconds(self) -> float:
        """The round in which the device was waited for between stages."""
        return sum(self.stage_seconds.values())

    def text(self) -> str:
        """The summary for people."""
        head = (
            f"a round takes {self.round_seconds:.4g} s undisturbed, {self.staged_seconds:.4g} s with its stages one "
            f"after the other (medians of {self.rounds}); {self.machine}"
        )
        width = max(map(len, self.stage_seconds))
        lines = [
            f"{name:<{width}}  {seconds:10.4f} s  {seconds / self.staged_seconds:6.1%}"
            for name, seconds in self.stage_seconds.items()
        ]
        gpu = [] if self.peak_bytes is None else [f"peak GPU memory {self.peak_bytes / 2**30:.2f} GiB"]
        if self.kernel_seconds is not None:
            gpu.append(f"the GPU computes for {self.kernel_seconds:.4g} s of a round, in {self.kernels} kernels")
        traced = ["dearest operators of one round:", self.operators] if self.operators else []
        return "\n".join([head, "", *lines, "", *gpu, *traced])

    def write(self, folder: Path) -> None:
        """``summary.txt`` and ``summary.json``."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "summary.txt").write_text(self.text() + "\n", encoding="utf-8")
        (folder / "summary.json").write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def profile(config: ConfigDict, folder: Path, rounds: int = 3) -> Profile | None:
    """Profile rounds of ``config`` and write ``summary.txt``, ``summary.json`` and ``trace.json.gz`` into ``folder``.

    The run itself lives in ``folder/run``: no run of the user's is touched, nothing is evaluated or saved. Every
    process of a distributed run takes part; the first one writes and returns the profile, the others return None.
    Raises what :func:`diffusionopd.training.train` raises before its first round.
    """
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.save_dir = str(folder / "run")
        config.resume_from = ""
        config.log_with = ""
        config.num_epochs = 2 * rounds + 3  # more than are run: the last one would be monitored
        config.eval_freq = config.sample_freq = 0
    accelerator = make_accelerator(config)
    trainer = Trainer(config, check(config, accelerator.num_processes, REGISTRY), accelerator)
    try:
        return _measure(trainer, folder, rounds)
    finally:
        trainer.close()


def _measure(trainer: Trainer, folder: Path, rounds: int) -> Profile | None:
    numbers = iter(tqdm(range(2 * rounds + 2), desc="profiling", unit="round", disable=not trainer.is_main))
    trainer.round(next(numbers))  # warm-up
    if trainer.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(trainer.device)
    undisturbed, staged = [], []
    for _ in range(rounds):  # in turn, so that whatever else the machine does meets both alike
        undisturbed.append(_seconds(trainer, next(numbers)))
        staged.append(_stages(trainer, next(numbers)))
    found = Profile(
        round_seconds=median(undisturbed),
        stage_seconds=_median_of_each(staged),
        peak_bytes=torch.cuda.max_memory_allocated(trainer.device) if trainer.device.type == "cuda" else None,
        rounds=rounds,
        machine=f"{trainer.device}, torch {torch.__version__}, {trainer.world} process(es)",
    )
    if trainer.is_main:
        found.write(folder)  # a trace of a large model's round takes minutes, and may be cut short
    found = _trace(trainer, next(numbers), found, folder)
    next(numbers, None)  # closes the bar
    return found if trainer.is_main else None


def _trace(trainer: Trainer, index: int, found: Profile, folder: Path) -> Profile:
    """One round under torch's profiler; the trace goes into ``folder``, its table into the profile."""
    gpu = trainer.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if gpu else [])
    with torch.profiler.profile(activities=activities) as traced:
        trainer.round(index)
    if not trainer.is_main:
        return found
    events = traced.key_averages()
    own = "self_device_time_total" if gpu else "self_cpu_time_total"
    kernels = [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    found = replace(
        found,
        operators=events.table(sort_by=own, row_limit=12, max_name_column_width=40),
        kernel_seconds=sum(event.self_device_time_total for event in kernels) / 1e6 if gpu else None,
        kernels=sum(event.count for event in kernels) if gpu else None,
    )
    found.write(folder)
    traced.export_chrome_trace(str(folder / "trace.json.gz"))
    return found


def _seconds(trainer: Trainer, index: int) -> float:
    started = time.perf_counter()
    trainer.round(index)
    if trainer.device.type == "cuda":
        torch.cuda.synchronize(trainer.device)
    return time.perf_counter() - started


def _stages(trainer: Trainer, index: int) -> dict[str, float]:
    with timed_stages(trainer.device) as seconds:
        whole = _seconds(trainer, index)
    return dict(seconds) | {OTHER: whole - sum(seconds.values())}


def _median_of_each(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for row in rounds for name in row)
    medians = {name: median(row.get(name, 0.0) for row in rounds) for name in names}
    return dict(sorted(medians.items(), key=lambda item: -item[1]))
