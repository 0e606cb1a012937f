"""The page of a merge: what each LoRA draws, what their plain sum draws, what the student draws; and how much is kept.

    python -m tools.merged logs/merge [--prompts 4] [--ties] [--output FILE]

On each LoRA's own prompts, all models draw from the same noise. The share of a LoRA's effect that a model has is
1 - |v - v_lora|^2 / |v_base - v_lora|^2 of the guided velocities, over the states that the LoRA's own sampling visits:
1 is the LoRA itself, 0 no better than the base model, below 0 worse.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from anywhere

import numpy as np
import torch
from accelerate import PartialState
from ml_collections import ConfigDict
from torch import Tensor

from diffusionopd.config_schema import ConfigError
from diffusionopd.data.noise import Stream, noise
from diffusionopd.data.prompts import Prompt, load_folders
from diffusionopd.data.tasks import Task
from diffusionopd.files import ensure_writable, path_flag, write_atomically, write_json
from diffusionopd.models.conditions import NEGATIVE
from diffusionopd.models.loading import DTYPES
from diffusionopd.models.lora_files import LoraWeights, load_lora
from diffusionopd.models.merging import merge
from diffusionopd.models.policies import STUDENT, Policies, Request
from diffusionopd.models.settings import BaseSettings, MemorySettings
from diffusionopd.rewards.images import to_uint8
from diffusionopd.training import check
from diffusionopd.training.checkpoint import locate
from diffusionopd.training.loading import fill_text_cache, load_loras, load_models
from diffusionopd.training.plan import Plan
from diffusionopd.training.resume import read_run_config
from diffusionopd.transitions import transition
from tools.report import Drawn, render_gallery
from tools.report.pages import aligned

BASE, LORA, SUM, MEAN, TIES = "base", "LoRA", "sum", "sum / n", "TIES"
_TITLES = {BASE: "base model", LORA: "the LoRA", SUM: "all at 1", MEAN: "all at 1/n", TIES: TIES, STUDENT: "student"}


_NOTE = (
    "Share of a LoRA's effect: 1 - |v - v(LoRA)|² / |v(base) - v(LoRA)|² of the guided velocities, at the states that "
    "the LoRA's own sampling visits on its own prompts. 100% is the LoRA itself, 0% is as far from it as the base "
    "model, below 0% farther. Distance: the root of the mean of |v - v(LoRA)|²."
)


@dataclass(frozen=True)
class Measured:
    """What was found on one LoRA's prompts; by model."""

    name: str
    prompts: Sequence[str]
    images: Mapping[str, np.ndarray]  # uint8 [N, H, W, 3]
    distance: Mapping[str, float]  # root mean squared, from the LoRA's velocity

    def share(self, model: str) -> float:
        """The share of the LoRA's effect that a model has."""
        return 1 - (self.distance[model] / self.distance[BASE]) ** 2


@torch.no_grad()
def measure(run: Path, prompts: int = 4, ties: bool = False) -> tuple[Plan, list[Measured]]:
    """Every LoRA of a run on its first ``prompts`` distinct prompts. ValueError where there is no checkpoint of one."""
    checkpoint = locate(str(run))
    plan = check(ConfigDict(read_run_config(checkpoint / "config.json"), type_safe=False), 1)
    if not plan.algorithm.has_teachers or any(task.model for task in plan.tasks):
        raise ConfigError([f"{run} has teachers that are no LoRAs, or none: this page is about LoRAs in one student"])
    # Of a training by several processes that has just ended, this is the first.
    device, dtype = PartialState().device, DTYPES[plan.read(MemorySettings).mixed_precision]
    loras = load_loras(plan, {})
    prompts_of = {task.name: _first_prompts(task, prompts) for task in plan.tasks}
    cache = fill_text_cache(plan, [NEGATIVE, *(p.key for own in prompts_of.values() for p in own)], device, dtype)
    backbone, adapters = load_models(plan, device, dtype, loras | {STUDENT: load_lora(checkpoint)})
    backbone.negative = cache.get([NEGATIVE], device, dtype)
    policy_of: dict[str, str | None] = {BASE: None, STUDENT: STUDENT}
    for index, (name, weights) in enumerate(_merges([loras[task.adapter] for task in plan.tasks], ties).items()):
        policy_of[name] = f"merge_{index}"
        adapters.add_from(f"merge_{index}", weights)
    policies, resolution = Policies(backbone, adapters), plan.read(BaseSettings).resolution
    sigmas = backbone.sigmas(plan.watch.eval_num_steps, resolution).tolist()
    found = []
    for index, task in enumerate(plan.tasks):
        own = prompts_of[task.name]
        keys = [(Stream.EVALUATION, plan.values["seed"], index, i) for i in range(len(own))]
        start = noise(backbone.latent_shape(resolution), keys).to(device)
        asked = policy_of | {LORA: task.adapter}
        guidance = dict.fromkeys(asked, task.guidance_scale) | {STUDENT: plan.sampler.guidance}
        text = cache.get([prompt.key for prompt in own], device, dtype)
        requests = {n: partial(Request, p, conditions=text, guidance=guidance[n]) for n, p in asked.items()}
        latents, distance = _draw(policies, requests, start, sigmas)
        images = {n: to_uint8(backbone.decode(x)) for n, x in latents.items()}
        found.append(Measured(task.name, [prompt.text for prompt in own], images, distance))
    return plan, found


def _merges(loras: Sequence[LoraWeights], ties: bool) -> dict[str, LoraWeights]:
    """What people do without training, each at the rank that loses nothing of the sum."""
    rank = sum(max(a.shape[0] for a in lora.a.values()) for lora in loras)
    everything = merge(loras, rank).weights
    merges = {SUM: everything, MEAN: everything.scaled(1 / len(loras))}
    return merges | ({TIES: merge(loras, rank, "ties").weights} if ties else {})


def _draw(
    policies: Policies, requests: Mapping[str, Callable[..., Request]], start: Tensor, sigmas: Sequence[float]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Each model's latents by the first-order ODE; and its distance from the LoRA at the states of the LoRA's."""
    x = dict.fromkeys(requests, start)
    squares = dict.fromkeys(requests, 0.0)
    for sigma, after in pairwise(sigmas):
        at_lora = policies.frozen([make(x=x[LORA], sigma=sigma) for make in requests.values()])
        there = {name: v for name, (v, _) in zip(requests, at_lora, strict=True)}
        others = [name for name in requests if name != LORA]
        at_own = policies.frozen([requests[name](x=x[name], sigma=sigma) for name in others])
        own = there | {name: v for name, (v, _) in zip(others, at_own, strict=True)}
        for name, v in there.items():
            squares[name] += (v - there[LORA]).double().square().mean().item() / (len(sigmas) - 1)
        x = {name: transition("ode", sigma, after).mean(state, own[name]) for name, state in x.items()}
    return x, {name: square**0.5 for name, square in squares.items()}


def _first_prompts(task: Task, count: int) -> list[Prompt]:
    loaded = load_folders(task.folders, task.prompt_fn, "train", trigger=task.trigger)[0]
    return list({prompt.key: prompt for prompt in loaded}.values())[:count]


def rows(found: Sequence[Measured]) -> list[tuple[str, ...]]:
    """The table: a head, a row each, the mean; shares, and the distances that they are of."""
    models = [name for name in _TITLES if name in found[0].distance and name != LORA]
    others = [name for name in models if name != BASE]
    head = ("LoRA", *(f"{_TITLES[name]}: share" for name in others), *(f"{_TITLES[name]}: distance" for name in models))
    body = [
        (m.name, *(f"{m.share(name):.1%}" for name in others), *(f"{m.distance[name]:.4f}" for name in models))
        for m in found
    ]
    shares = (f"{np.mean([m.share(name) for m in found]):.1%}" for name in others)
    distances = (f"{np.mean([m.distance[name] for m in found]):.4f}" for name in models)
    return [head, *body, ("mean", *shares, *distances)]


def summary(found: Sequence[Measured]) -> dict[str, dict[str, dict[str, float]]]:
    """The table as values: LoRA -> "share" and "distance" by model."""
    return {
        m.name: {"share": {n: m.share(n) for n in m.distance if n != BASE}, "distance": dict(m.distance)} for m in found
    }


def page(plan: Plan, found: Sequence[Measured], student: str) -> str:
    """The page as HTML: the table, then a row of images for each LoRA and prompt; ``student``: where it is."""
    columns = [
        Drawn(title, [image for m in found for image in m.images[name]])
        for name, title in _TITLES.items()
        if name in found[0].images
    ]
    tasks = [
        (task.name, f"{task.lora_path}, times {task.scale:g}, guidance {task.guidance_scale:g}") for task in plan.tasks
    ]
    return render_gallery(
        f"{len(found)} LoRAs in one",
        [(m.name, prompt) for m in found for prompt in m.prompts],
        columns,
        facts=[("base model", plan.values["pretrained.model"]), ("student", student), *tasks],
        notes=[_NOTE],
        table=rows(found),
    )


def write(run: Path, output: Path | None = None, prompts: int = 4, ties: bool = False) -> Path:
    """Write the page and, beside it, its table as JSON; print the table. ValueError as of `measure`, and where they
    cannot be written."""
    output = output or (run if (run / "checkpoints").is_dir() else locate(run).parent.parent) / "merged.html"
    if output.with_suffix(".json").exists() and not output.exists():
        raise ConfigError([f"{output.with_suffix('.json')} is of no such page and would be replaced: choose --output"])
    ensure_writable(output.parent, "folder of the page", "Choose another with --output, or free space.")
    plan, found = measure(run, prompts, ties)
    file = write_atomically(output, page(plan, found, str(locate(run))))
    write_json(file.with_suffix(".json"), summary(found))
    print(aligned(rows(found)))
    print(f"written: {file.absolute()}")
    return file


def main() -> None:
    """Flags to a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=path_flag, help="folder of a run, as diffusionopd merge writes it")
    parser.add_argument("--prompts", type=int, default=4, help="of each LoRA, the first ones")
    parser.add_argument("--ties", action="store_true", help="also the merge by TIES; minutes for a large model")
    parser.add_argument("--output", type=path_flag, help="the page; default RUN/merged.html")
    flags = parser.parse_args()
    try:
        write(flags.run, flags.output, flags.prompts, flags.ties)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
