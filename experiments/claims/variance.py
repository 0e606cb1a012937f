"""How noisy the PPO-style surrogate's gradient is beside the closed form's, at the same visited states.

    python experiments/claims/variance.py --seed 1          two minutes on one core; writes results/variance-seed1.json

At a state that the student visits, the closed form (eq. 11) has one gradient, whatever noise the step draws. That of
the surrogate (section 3.3) is a random vector with the same mean. Over draws of the step's noise this measures, in the
space of the student's LoRA, whether the means agree and how large the variance is, beside what the formula of
docs/method.md predicts. With ``d = (mu_S - mu_T) / s``, ``KL = |d|^2 / 2`` (sums over the ``D`` values of a latent) and
the Jacobian ``J`` of ``v_S`` in the LoRA, one image's gradient is ``b / (s D) (KL + eps.d) J^T eps``, so that

    mean = b / (s D) J^T d,      variance = (b / (s D))^2 ((KL^2 + |d|^2) |J|_F^2 + |J^T d|^2).

``KL^2`` is the score-function noise of which the paper speaks, and what the baseline ``-KL`` takes away ("centred");
the rest comes from the advantage's own dependence on the sample. ``|J|_F^2`` is estimated with random vectors of its
own, so that the prediction shares no draw with the measurement. Variances are traces of covariances; those of a batch
of B images are for the mean over the batch.
"""

# ruff: noqa: E402

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # run as a script from anywhere

import torch
from torch import Tensor

from benchmarks.world import TINY, assemble
from diffusionopd.algorithms.opd import Opd
from diffusionopd.algorithms.settings import SamplerSettings
from diffusionopd.data.batches import Batch
from diffusionopd.data.noise import Stream, noise
from diffusionopd.data.prompts import load_prompts
from diffusionopd.files import write_atomically
from diffusionopd.losses import distillation_loss, policy_gradient_loss
from diffusionopd.models.conditions import NEGATIVE, Conditions
from diffusionopd.models.loading import load_backbone, load_text_encoder
from diffusionopd.tiny.grammar import PROMPT_FN
from diffusionopd.tiny.models import CONTEXT
from diffusionopd.tiny.render import RESOLUTION
from diffusionopd.transitions import Transition, schedule

OUTPUT = Path(__file__).with_name("results")
CLIP_RANGE = 1e-4
NUM_STEPS = 10
DRAW, PROBE = 0, 1  # what random numbers are for
Draw = Callable[[int, int], Tensor]
"""``(DRAW or PROBE, number) -> [B, C, h, w]`` standard normal noise."""


def measure(
    transition: Transition,
    x: Tensor,
    v_student: Tensor,
    v_teacher: Tensor,
    parameters: Sequence[Tensor],
    draw: Draw,
    draws: int,
    probes: int,
) -> dict[str, Any]:
    """The surrogate's gradient at the state ``x``, over ``draws`` of the step's noise, beside the closed form's.

    Tensors ``[B, C, h, w]`` with B at least 2; ``v_student`` carries the graph to ``parameters``. ``probes`` random
    vectors estimate the Jacobian's norm. All figures are for the mean over the B images.
    """
    old = v_student.detach()

    def pulled_back(cotangent: Tensor) -> Tensor:
        gradients = torch.autograd.grad(v_student, parameters, cotangent, retain_graph=True)
        return torch.cat([gradient.flatten() for gradient in gradients]).double()

    def of_loss(loss: Callable[[Tensor], Tensor]) -> Tensor:
        leaf = old.clone().requires_grad_()
        return torch.autograd.grad(loss(leaf).mean(), leaf)[0]

    def surrogate(x_next: Tensor, centred: bool) -> Tensor:
        return of_loss(lambda v: policy_gradient_loss(transition, x, x_next, v, old, v_teacher, CLIP_RANGE, centred))

    # The closed form's gradient, each image's part by itself: the batch with zeros in the place of all others
    closed_form = of_loss(lambda v: distillation_loss(transition, v, v_teacher))
    alone = torch.eye(len(x), dtype=x.dtype).view(len(x), len(x), *[1] * (x.ndim - 1))
    parts = torch.stack([pulled_back(mask * closed_form) for mask in alone])
    closed = parts.sum(0)

    def over_draws(centred: bool) -> dict[str, Any]:
        total, squares, cosine = torch.zeros_like(closed), 0.0, {}
        for k in range(1, draws + 1):
            gradient = pulled_back(surrogate(transition.sample(x, old, draw(DRAW, k - 1)), centred))
            total += gradient
            squares += gradient.square().sum().item()
            if k & (k - 1) == 0 or k == draws:  # powers of two, and all of them
                cosine[k] = torch.nn.functional.cosine_similarity(total, closed, dim=0).item()
        mean = total / draws
        return {
            "variance": (squares - draws * mean.square().sum().item()) / (draws - 1),
            "predicted": in_all_directions(squared.sqrt()) + along + (0.0 if centred else score_function),
            # draws x |mean of the draws - closed form|^2, whose expectation is the variance
            "error": draws * (mean - closed).square().sum().item(),
            "cosine": cosine,  # number of draws -> cosine of their mean with the closed form
        }

    # The formula
    distance = (transition.b * (old - v_teacher) / transition.std).flatten(1).double()
    squared = distance.square().sum(1)
    factor = transition.b / (transition.std * distance.shape[1] * len(x))

    def in_all_directions(scale: Tensor) -> float:
        """Mean of ``|J^T (scale eps)|^2`` over the probes: ``sum scale^2 |J|_F^2`` over the images."""
        weights = (factor * scale).to(x.dtype).view(-1, *[1] * (x.ndim - 1))
        return fmean(pulled_back(weights * draw(PROBE, k)).square().sum().item() for k in range(probes))

    score_function = in_all_directions(0.5 * squared)
    along = parts.square().sum().item()  # (b / (s D))^2 |J^T d|^2 of each image in the mean over B
    return {
        "kl": 0.5 * squared.mean().item(),  # of an image, summed over dimensions
        "closed_squared": closed.square().sum().item(),  # squared norm of the closed form's gradient
        "between_pictures": parts.var(0).sum().item() * len(x),  # its variance over prompts and initial noise
        "score_function": score_function,  # the part with KL^2 of the plain surrogate's variance, by the formula
        # The surrogate's gradient over draws of the step's noise
        "plain": over_draws(centred=False),
        "centred": over_draws(centred=True),
    }


def main() -> None:
    """Measure at a few steps of each noise level and write the file, of which the report makes a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=64, help="of each step's noise")
    parser.add_argument("--probes", type=int, default=48, help="random vectors for the Jacobian's norm")
    parser.add_argument("--task", choices=PROMPT_FN, default="compose")
    parser.add_argument("--pictures", type=int, default=4, help="images, at least 2")
    parser.add_argument("--rounds", type=int, default=5, help="of distillation before the measurement; 0: the base")
    parser.add_argument("--levels", type=float, nargs="+", default=[0.3, 0.7], help="noise levels")
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 2, 4, 6, 8], help="of the 10 of a trajectory")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, help="default: results/variance-seed<seed>.json")
    args = parser.parse_args()
    args.output = args.output or OUTPUT / f"variance-seed{args.seed}.json"
    torch.set_num_threads(1)
    started = time.perf_counter()
    algorithm, batch = build(args)
    for i in range(args.rounds):
        algorithm.round([replace(batch, noise=first_noise(args, algorithm, 1 + i))])
    states = [{"noise": level, **s} for level in args.levels for s in estimates(algorithm, batch, level, args)]
    settings = {key: value for key, value in vars(args).items() if key != "output"}
    options = [f"--{key} {shlex.join(map(str, v if isinstance(v, list) else [v]))}" for key, v in settings.items()]
    result = {
        "command": " ".join(["python experiments/claims/variance.py", *options]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, one thread, torch {torch.__version__}",
        "seconds": round(time.perf_counter() - started, 1),
        "settings": settings,
        "states": states,
    }
    write_atomically(args.output, json.dumps(result, indent=1) + "\n")
    print(f"wrote {args.output}; for the table: python experiments/claims/report.py")


def build(args: argparse.Namespace) -> tuple[Opd, Batch]:
    """The shipped base, its teacher of the task, a fresh student, and training prompts from all over the file."""
    backbone = load_backbone(str(TINY / "model"))
    encoder = load_text_encoder(str(TINY / "model"), max_sequence_length=CONTEXT)
    backbone.negative = Conditions.of(encoder([NEGATIVE]))
    known = load_prompts(TINY / "dataset" / args.task, PROMPT_FN[args.task], "train")
    prompts = known[:: len(known) // args.pictures][: args.pictures]
    text = Conditions.of(encoder([prompt.text for prompt in prompts]))
    nothing = torch.zeros(len(prompts), *backbone.latent_shape(RESOLUTION))
    sampler = SamplerSettings(num_steps=NUM_STEPS, guidance_scale=1.0, noise_level=0.0, timestep_fraction=0.9)
    sigmas, teachers = backbone.sigmas(NUM_STEPS, RESOLUTION), [TINY / "teachers" / args.task / "lora"]
    algorithm, (batch,) = assemble(
        backbone, teachers, [text], [nothing], sampler, sigmas, seed=args.seed, fused_optimizer=False
    )
    return algorithm, batch


def first_noise(args: argparse.Namespace, algorithm: Opd, number: int) -> Tensor:
    """The initial noise of a training round, or with number 0 of the measured trajectory."""
    keys = [(Stream.LATENT, args.seed, number, i) for i in range(args.pictures)]
    return noise(algorithm.policies.backbone.latent_shape(RESOLUTION), keys)


def estimates(algorithm: Opd, batch: Batch, level: float, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The figures at the chosen steps of one flow-SDE trajectory of the student at this noise level."""
    x, student, parameters = first_noise(args, algorithm, 0), algorithm.student(batch), algorithm.optimizer.parameters
    sigmas = algorithm.policies.backbone.sigmas(NUM_STEPS, RESOLUTION)
    for step, transition in enumerate(schedule("flow_sde", sigmas, level)):

        def drawn(stream: Stream, *key: int, step: int = step) -> Tensor:
            return noise(batch.noise.shape[1:], [(stream, args.seed, i, step, *key) for i in range(args.pictures)])

        if step in args.steps:
            v_teacher, v_student = algorithm.teacher(batch)(x, transition.sigma), student(x, transition.sigma)
            draw = partial(drawn, Stream.FORWARD)
            figures = measure(transition, x, v_student, v_teacher, parameters, draw, args.draws, args.probes)
            yield {"step": step, "sigma": transition.sigma, **figures}
        with torch.no_grad():
            x = transition.sample(x, student(x, transition.sigma), drawn(Stream.STEP))


if __name__ == "__main__":
    main()
