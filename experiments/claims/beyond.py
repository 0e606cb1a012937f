"""What a strength does to the pictures: scores, spread and distance to the base of teachers, targets and students.

    python experiments/claims/beyond.py --seed 1        ten minutes on one core; writes results/beyond-seed1.json

A student of targets at a strength may miss a score because its targets do, or because it does not reach them. So the
targets themselves draw, too: each velocity is ``v_ref + strength (v_teacher - v_ref)``, without any training, the base
being the reference. All draw the same validation prompts from the same noise, in the shipped tiny world, in which every
strength is an arm. The LoRAs are those in the run folders of ``run.py``, which calls this.

``spread``: mean distance of two images of one prompt. ``from_base``: mean distance to the base's image of the same
prompt and noise. Distances are those of ``diversity`` in a run's metrics: root mean square difference of thumbnails.
"""

# ruff: noqa: E402

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # run as a script from anywhere

import numpy as np
import torch
from tqdm import tqdm

from diffusionopd.data.noise import Stream, noise
from diffusionopd.data.prompts import Prompt, load_prompts
from diffusionopd.evaluation.job import Job, Model, load_policies
from diffusionopd.evaluation.sampling import follow
from diffusionopd.evaluation.testsets import Benchmark
from diffusionopd.files import write_atomically
from diffusionopd.losses import extrapolated
from diffusionopd.models.lora_files import load_lora
from diffusionopd.models.policies import Policies, Request
from diffusionopd.models.text_cache import TextCache
from diffusionopd.rewards import Scorer, build_scorer, to_uint8
from diffusionopd.tiny.models import CONTEXT
from diffusionopd.tiny.render import RESOLUTION
from diffusionopd.training.collapse import diversities, thumbnails
from experiments.claims.arms import HALF, LOSSES, Arm
from experiments.claims.results import RESULTS, ClaimsError, read_results
from experiments.claims.runs import Run, Runner, arms_in
from experiments.claims.worlds import TINY, World, WorldTask

MODEL = ROOT / "assets" / "tiny" / "model"
NUM_STEPS = 10
BATCH = 60
FIRST = "first: python experiments/claims/run.py strength"


@dataclass(frozen=True)
class Source:
    """What draws: a LoRA or, without one, the base; where ``drawn`` is not 1, the target at that strength."""

    kind: str  # base, teacher, target, or the loss of a student: opd, paper
    rounds: int  # of its teachers; 0 for the base
    strength: float
    lora: Path | None
    task: str = ""  # the only one of which it draws; empty: all
    drawn: float = 1.0


@dataclass(frozen=True)
class Figures:
    """The images of one source for one task."""

    kind: str
    rounds: int
    strength: float
    task: str
    score: float
    spread: float
    from_base: float


@dataclass(frozen=True)
class Painter:
    """Draws a task's prompts, a few images of each, and scores them."""

    policies: Policies
    cache: TextCache
    seed: int
    images: int  # of a prompt

    def pictures(self, source: Source, policy: str, prompts: Sequence[Prompt]) -> np.ndarray:
        """Uint8 ``[B, H, W, 3]``, the images of a prompt one after another."""
        keys = [(i, number) for i in range(len(prompts)) for number in range(self.images)]
        parts = [keys[start : start + BATCH] for start in range(0, len(keys), BATCH)]
        return np.concatenate([self._batch(source, policy, prompts, part) for part in parts])

    @torch.no_grad()
    def _batch(
        self, source: Source, policy: str, prompts: Sequence[Prompt], samples: Sequence[tuple[int, int]]
    ) -> np.ndarray:
        backbone = self.policies.backbone
        conditions = self.cache.get([prompts[i].key for i, _ in samples], backbone.device)
        x = noise(backbone.latent_shape(RESOLUTION), [(Stream.EVALUATION, self.seed, *sample) for sample in samples])

        def velocity(x: torch.Tensor, sigma: float) -> torch.Tensor:
            asked = [policy] if source.drawn == 1.0 else [policy, "base"]
            answers = self.policies.frozen([Request(name, x, sigma, conditions) for name in asked])
            return extrapolated(answers[-1][0], answers[0][0], source.drawn)

        ends = follow(velocity, x, backbone.sigmas(NUM_STEPS, RESOLUTION), backbone.multistep)
        return to_uint8(backbone.decode(ends))


def figures(
    source: Source, task: WorldTask, prompts: Sequence[Prompt], images: np.ndarray, base: np.ndarray, scorer: Scorer
) -> Figures:
    """The figures of images of ``prompts``, beside the base's of the same noise: both uint8 ``[B, H, W, 3]``."""
    texts, metadata = [prompt.text for prompt in prompts], [prompt.metadata for prompt in prompts]
    scores = scorer.score(images, texts, metadata)
    small, before = thumbnails(images), thumbnails(base)
    distances = np.square(small - before).mean(axis=(1, 2, 3)) ** 0.5
    return Figures(
        source.kind, source.rounds, source.strength, task.name,
        score=round(float(np.mean(scores[task.reward])), 4),
        spread=round(diversities(list(small), texts)["prompt_diversity"], 4),
        from_base=round(float(distances.mean()), 4),
    )  # fmt: skip


def sources(world: World, seed: int, runner: Runner) -> list[Source]:
    """The base, teachers, their targets, and the students of these, of a world's arms on strength.

    Raises ClaimsError where a LoRA, or the result by which validation chose a rate, is not there.
    """
    chosen = read_results(runner.results, world)[1]
    if not all((loss, HALF) in chosen for loss in LOSSES):
        raise ClaimsError(f"{runner.results} does not say which rate was chosen; {FIRST}")
    arms = [arm for arm in arms_in(world.name).values() if arm.group == "strength"]
    found = [Source("base", 0, 1.0, None)]
    for rounds in sorted({arm.teacher_rounds for arm in arms}):
        own = [arm for arm in arms if arm.teacher_rounds == rounds]
        strengths = sorted({_strength(arm) for arm in own} - {1.0})
        trained = next(arm for arm in own if arm.kind != "same")
        for task, run in zip(world.names, Run(world.name, trained.name, "", seed).teachers, strict=True):
            lora = runner.lora(run)
            found.append(Source("teacher", rounds, 1.0, lora, task))
            found += [Source("target", rounds, strength, lora, task, drawn=strength) for strength in strengths]
        for arm in own:
            loss = next(loss for loss in LOSSES if arm.name.startswith(f"strength_{loss}_"))
            same = arm.kind == "same"  # as what validation chose
            run = Run(world.name, chosen[loss, HALF], HALF, seed) if same else Run(world.name, arm.name, "", seed)
            found.append(Source(loss, rounds, _strength(arm), runner.lora(run)))
    if missing := [str(source.lora) for source in found if source.lora and not source.lora.is_dir()]:
        raise ClaimsError(f"no LoRA in {', '.join(missing)}; {FIRST}")
    return found


def _strength(arm: Arm) -> float:
    return arm.changes.get("strength", 1.0)


def measure(world: World, sources: Sequence[Source], seed: int, prompts: int, images: int) -> Iterator[Figures]:
    """The figures of every source on its tasks, the base first; of each task so many prompts, with ``images`` each."""
    asked = {}
    for task in world.tasks:
        every = list(dict.fromkeys(load_prompts(ROOT / world.folder(task, "validation"), task.prompt_fn, "test")))
        asked[task] = every[:: -(-len(every) // prompts)]
    loras = {source.lora: load_lora(source.lora) for source in sources if source.lora}
    names: dict[Path | None, str] = {None: "base", **{lora: f"model {i}" for i, lora in enumerate(loras)}}
    job = Job(
        str(MODEL), [Model("base"), *(Model(names[path], lora) for path, lora in loras.items())],
        [Benchmark(task.name, asked[task], (task.reward,), NUM_STEPS, 1.0) for task in world.tasks],
        output=RESULTS, resolution=RESOLUTION, seed=seed, max_sequence_length=CONTEXT,
    )  # fmt: skip
    cache, policies = load_policies(job, torch.float32, torch.device("cpu"))
    painter = Painter(policies, cache, seed, images)
    scorers = {task: build_scorer(task.reward) for task in world.tasks}
    base: dict[WorldTask, np.ndarray] = {}
    for source in tqdm(sources, unit="model"):
        for task in world.tasks:
            if source.task in ("", task.name):
                drawn = painter.pictures(source, names[source.lora], asked[task])
                lines = [prompt for prompt in asked[task] for _ in range(images)]
                yield figures(source, task, lines, drawn, base.setdefault(task, drawn), scorers[task])


def main() -> None:
    """Measure, and write the file, of which the report makes a table and a picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=60, help="of a task, at most")
    parser.add_argument("--images", type=int, default=3, help="of a prompt, at least 2")
    parser.add_argument("--logs", type=Path, default=ROOT / "logs" / "claims", help="run folders")
    parser.add_argument("--results", type=Path, default=RESULTS, help="which rates validation chose")
    parser.add_argument("--output", type=Path, help="default: results/beyond-seed<seed>.json")
    parser.add_argument("--quick", action="store_true", help="the LoRAs of quick runs")
    args = parser.parse_args()
    os.chdir(ROOT)  # caches are kept there
    torch.set_num_threads(1)
    TINY.write_prompts(ROOT)
    started, output = time.perf_counter(), args.output or RESULTS / f"beyond-seed{args.seed}.json"
    try:
        drawing = sources(TINY, args.seed, Runner(args.logs.resolve(), args.results.resolve(), args.quick))
    except ClaimsError as error:
        sys.exit(f"error: {error}")
    found = [asdict(each) for each in measure(TINY, drawing, args.seed, args.prompts, args.images)]
    result = {
        "digest": TINY.digest(),
        "settings": {"seed": args.seed, "prompts": args.prompts, "images": args.images, "quick": args.quick},
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, one thread, torch {torch.__version__}",
        "seconds": round(time.perf_counter() - started, 1),
        "figures": found,
    }
    write_atomically(output, json.dumps(result, indent=1) + "\n")
    print(f"wrote {output}; for the table: python experiments/claims/report.py")


if __name__ == "__main__":
    main()
