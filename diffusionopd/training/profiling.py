"""Where a round's time goes: undisturbed time, stages one by one, and a trace for Perfetto or chrome://tracing."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from ml_collections import ConfigDict
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from tqdm import tqdm

from diffusionopd.files import write_atomically, write_json
from diffusionopd.stages import timed_stages
from diffusionopd.training.loop import train_round
from diffusionopd.training.setup import Run, started

OTHER = "everything else"


def profile(config: ConfigDict, folder: Path, rounds: int = 3) -> dict[str, Any] | None:
    """Profile rounds of ``config`` and write ``summary.txt``, ``summary.json`` and ``trace.json.gz`` into ``folder``.

    The run itself lives in ``folder/run``: no run of the user's is touched, nothing is evaluated or saved. Every
    process of a distributed run takes part; the first one returns what ``summary.json`` has, the others None:

    - ``round_seconds``: a median round, undisturbed
    - ``stage_seconds``: its stages one after the other, longest first, and the rest of the round
    - ``kernel_seconds``, ``kernels``: how long the GPU computes in a round, and in how many CUDA kernels (None without)
    - ``peak_bytes`` of GPU memory; ``rounds``; ``machine``; ``operators``: torch's table of the most expensive ones

    Raises what :func:`diffusionopd.training.train` raises before its first round.
    """
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.save_dir = str(folder / "run")
        config.resume_from = ""
        config.log_with = ""
        # More than are run, for the last one would be monitored; no fewer than the real run's, to compile as that does
        config.num_epochs = max(config.num_epochs, 2 * rounds + 3)
        config.eval_freq = config.sample_freq = 0
    with started(config) as run:
        assert run is not None
        return _measure(run, folder, rounds)


def _measure(run: Run, folder: Path, rounds: int) -> dict[str, Any] | None:
    device = run.accelerator.device
    gpu = device.type == "cuda"
    numbers = iter(tqdm(range(1, 2 * rounds + 3), desc="profiling", unit="round", disable=not run.is_main))

    def seconds() -> float:
        """Of the next round."""
        start = time.perf_counter()
        train_round(run, next(numbers))
        if gpu:
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    seconds()  # warm-up
    if gpu:
        torch.cuda.reset_peak_memory_stats(device)
    undisturbed, staged = [], []
    for _ in range(rounds):  # in turn, so that whatever else the machine does affects both alike
        undisturbed.append(seconds())
        with timed_stages(device) as stages:
            total = seconds()
        staged.append(stages | {OTHER: total - sum(stages.values())})
    names = {name for stages in staged for name in stages}
    medians = {name: median(stages.get(name, 0.0) for stages in staged) for name in names}
    summary: dict[str, Any] = {
        "round_seconds": median(undisturbed),
        "stage_seconds": dict(sorted(medians.items(), key=lambda item: -item[1])),
        "peak_bytes": torch.cuda.max_memory_allocated(device) if gpu else None,
        "rounds": rounds,
        "machine": f"{device}, torch {torch.__version__}, {run.plan.shape.num_processes} process(es)",
        "operators": "",
        "kernel_seconds": None,
        "kernels": None,
    }
    if run.is_main:
        _write(summary, folder)  # a trace of a large model's round takes minutes, and may be cut short
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if gpu else [])
    with torch.profiler.profile(activities=activities) as traced:
        train_round(run, next(numbers))
    next(numbers, None)  # closes the bar
    if not run.is_main:
        return None
    events = traced.key_averages()
    own = "self_device_time_total" if gpu else "self_cpu_time_total"
    summary["operators"] = events.table(sort_by=own, row_limit=12, max_name_column_width=40)
    if gpu:
        kernels = [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
        summary["kernel_seconds"] = sum(event.self_device_time_total for event in kernels) / 1e6
        summary["kernels"] = sum(event.count for event in kernels)
    _write(summary, folder)
    traced.export_chrome_trace(str(folder / "trace.json.gz"))
    return summary


def _write(summary: dict[str, Any], folder: Path) -> None:
    """``summary.json``, and the same for people."""
    write_json(folder / "summary.json", summary)
    stages = summary["stage_seconds"]
    staged, width = sum(stages.values()), max(map(len, stages))
    lines = [
        f"a round takes {summary['round_seconds']:.4g} s undisturbed, {staged:.4g} s with its stages one after the "
        f"other (medians of {summary['rounds']}); {summary['machine']}\n",
        *(f"{name:<{width}}  {seconds:10.4f} s  {seconds / staged:6.1%}" for name, seconds in stages.items()),
    ]
    if summary["peak_bytes"] is not None:
        lines.append(f"\npeak GPU memory {summary['peak_bytes'] / 2**30:.2f} GiB")
    if summary["kernels"] is not None:
        lines.append(f"the GPU computes for {summary['kernel_seconds']:.4g} s, in {summary['kernels']} kernels")
    lines.append(f"\nmost expensive operators of one round:\n{summary['operators']}" if summary["operators"] else "")
    write_atomically(folder / "summary.txt", "\n".join(lines) + "\n")
