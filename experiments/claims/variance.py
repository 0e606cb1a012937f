"""How noisy the PPO-style surrogate's gradient is beside the closed form's, at the same visited states.

    python experiments/claims/variance.py [--draws 64]      a minute or two on one core; writes results/variance.json

At a state that the student visits, the closed form (eq. 11) has one gradient, whatever noise the step draws. That of
the surrogate (section 3.3) is a random vector with the same mean. Over draws of the step's noise this measures, in the
space of the student's LoRA, whether the means agree and how large the variance is, beside what the formula of
docs/method.md predicts. With ``d = (mu_S - mu_T) / s``, ``KL = |d|^2 / 2`` (sums over the ``D`` values of a latent) and
the Jacobian ``J`` of ``v_S`` in the LoRA, one picture's gradient is ``b / (s D) (KL + eps.d) J^T eps``, so that

    mean = b / (s D) J^T d,      variance = (b / (s D))^2 ((KL^2 + |d|^2) |J|_F^2 + |J^T d|^2).

``KL^2`` is the score-function noise of which the paper speaks; the rest comes from the advantage's own dependence on
the sample. ``|J|_F^2`` is estimated with random vectors of its own, so that the prediction shares no draw with the
measurement. Variances are traces of covariances; those of a batch of B pictures are for the mean over the batch.
"""

# ruff: noqa: E402

from __future__ import annotations

import argparse
import json
import math
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # run as a script from anywhere

import torch
from torch import Tensor

from benchmarks.world import TARGETS, TINY
from diffusionopd.algorithms.base import STUDENT, Parts
from diffusionopd.algorithms.opd import Distiller, Recipe
from diffusionopd.algorithms.optim import StudentOptimizer
from diffusionopd.data.batches import Batch
from diffusionopd.data.noise import Stream, noise
from diffusionopd.data.prompts import load_prompts
from diffusionopd.losses import distillation_loss, policy_gradient_loss
from diffusionopd.models.backbone import Backbone, load_backbone, load_text_encoder
from diffusionopd.models.conditions import NEGATIVE, Conditions
from diffusionopd.models.lora import Adapters
from diffusionopd.rollout import Velocity, walk
from diffusionopd.transitions import Transition, schedule

OUTPUT = Path(__file__).with_name("results") / "variance.json"
CLIP_RANGE = 1e-4
TEACHER = "teacher"
PROMPT_FORMATS = {"compose": "geneval", "ocr": "general_ocr", "scene": "general_ocr"}
DRAW, PROBE = 0, 1  # what random numbers are for
Draw = Callable[[int, int], Tensor]
"""``(DRAW or PROBE, number) -> [B, C, h, w]`` standard normal noise."""


@dataclass(frozen=True)
class Estimate:
    """The surrogate's gradient at one state beside the closed form's; all for the mean over the state's B pictures."""

    kl: float  # of a picture, summed over dimensions
    closed_squared: float  # squared norm of the closed form's gradient
    between_pictures: float  # variance of that gradient over prompts and initial noise
    variance: float  # of the surrogate's gradient over draws of the step's noise, measured
    predicted: float  # the same by the formula
    score_function: float  # the part of ``predicted`` with KL^2
    error: float  # draws x |mean of the draws - closed form|^2; its expectation is the variance
    cosine: dict[int, float]  # number of draws -> cosine of their mean with the closed form


def measure(
    transition: Transition,
    x: Tensor,
    v_student: Tensor,
    v_teacher: Tensor,
    parameters: Sequence[Tensor],
    draw: Draw,
    draws: int,
    probes: int,
) -> Estimate:
    """Both gradients at the state ``x``, over ``draws`` draws of the step's noise.

    Tensors ``[B, C, h, w]`` with B at least 2; ``v_student`` carries the graph to ``parameters``. ``probes`` random
    vectors estimate the Jacobian's norm.
    """
    old = v_student.detach()

    def pulled_back(cotangent: Tensor) -> Tensor:
        gradients = torch.autograd.grad(v_student, parameters, cotangent, retain_graph=True)
        return torch.cat([gradient.flatten() for gradient in gradients]).double()

    def of_loss(loss: Callable[[Tensor], Tensor]) -> Tensor:
        leaf = old.clone().requires_grad_()
        return torch.autograd.grad(loss(leaf).mean(), leaf)[0]

    closed_form = of_loss(lambda v: distillation_loss(transition, v, v_teacher))
    parts = torch.stack([pulled_back(part) for part in _single_pictures(closed_form)])
    closed = parts.sum(0)
    total, squares, cosine = torch.zeros_like(closed), 0.0, {}
    for k in range(draws):
        x_next = transition.sample(x, old, draw(DRAW, k))
        gradient = pulled_back(
            of_loss(lambda v, n=x_next: policy_gradient_loss(transition, x, n, v, old, v_teacher, CLIP_RANGE))
        )
        total += gradient
        squares += gradient.square().sum().item()
        if (k + 1) & k == 0 or k + 1 == draws:  # powers of two, and all of them
            cosine[k + 1] = torch.nn.functional.cosine_similarity(total, closed, dim=0).item()
    mean = total / draws
    distance = (transition.b * (old - v_teacher) / transition.std).flatten(1).double()
    squared = distance.square().sum(1)
    factor = transition.b / (transition.std * distance.shape[1] * len(x))

    def in_all_directions(scale: Tensor) -> float:
        """Mean of ``|J^T (scale eps)|^2`` over the probes: ``sum scale^2 |J|_F^2`` over the pictures."""
        weights = (factor * scale).to(x.dtype).view(-1, *[1] * (x.ndim - 1))
        return fmean(pulled_back(weights * draw(PROBE, k)).square().sum().item() for k in range(probes))

    score_function = in_all_directions(0.5 * squared)
    along = parts.square().sum(1)  # (b / (s D))^2 |J^T d|^2 of each picture in the mean over B
    return Estimate(
        kl=0.5 * squared.mean().item(),
        closed_squared=closed.square().sum().item(),
        between_pictures=parts.var(0).sum().item() * len(x),
        variance=(squares - draws * mean.square().sum().item()) / (draws - 1),
        predicted=score_function + in_all_directions(squared.sqrt()) + along.sum().item(),
        score_function=score_function,
        error=draws * (mean - closed).square().sum().item(),
        cosine=cosine,
    )


def _single_pictures(batch: Tensor) -> Iterator[Tensor]:
    """The batch once a picture, with zeros in the place of all others."""
    for i in range(len(batch)):
        single = torch.zeros_like(batch)
        single[i] = batch[i]
        yield single


def expected_cosine(estimate: Estimate, draws: int) -> float:
    """Cosine of the mean of so many draws with the closed form if the error is unbiased and of the predicted size."""
    return 1 / math.sqrt(1 + estimate.predicted / (draws * estimate.closed_squared))


def main() -> None:
    """Measure at a few steps of each noise level, print a table, write the file."""
    args = parse()
    torch.set_num_threads(1)
    started = time.perf_counter()
    distiller, batch = build(args)
    for i in range(args.rounds):
        distiller.round([first_noise(distiller.backbone, batch, args.seed, i)])
    print(f"{args.task} teacher, student after {args.rounds} rounds, {args.pictures} pictures, {args.draws} draws")
    print("noise step sigma      KL  noise/signal  measured/predicted  KL^2 part  total/closed  cosine (expected)")
    states = []
    for level in args.levels:
        for step, transition, estimate in estimates(distiller, batch, level, args):
            cosine = estimate.cosine[args.draws]
            print(
                f"{level:5.1f} {step:4d} {transition.sigma:5.3f} {estimate.kl:7.3g} "
                f"{estimate.variance / estimate.closed_squared:13.3g} {estimate.variance / estimate.predicted:19.3f} "
                f"{estimate.score_function / estimate.predicted:10.3f} "
                f"{1 + estimate.variance / estimate.between_pictures:13.3g}  "
                f"{cosine:6.3f} ({expected_cosine(estimate, args.draws):.3f})"
            )
            states.append({"noise": level, "step": step, "sigma": transition.sigma, **asdict(estimate)})
    write(args, states, time.perf_counter() - started)


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=64, help="of each step's noise")
    parser.add_argument("--probes", type=int, default=48, help="random vectors for the Jacobian's norm")
    parser.add_argument("--task", choices=PROMPT_FORMATS, default="compose")
    parser.add_argument("--pictures", type=int, default=4, help="at least 2")
    parser.add_argument("--rounds", type=int, default=5, help="of distillation before the measurement; 0: the base")
    parser.add_argument("--levels", type=float, nargs="+", default=[0.3, 0.7], help="noise levels")
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 2, 4, 6, 8], help="of the 10 of a trajectory")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    return parser.parse_args()


def build(args: argparse.Namespace) -> tuple[Distiller, Batch]:
    """The shipped base, its teacher of the task, a fresh student, and training prompts from all over the file."""
    model = str(TINY / "model")
    backbone = load_backbone(model)
    adapters = Adapters(backbone.transformer, backbone.inert_modules())
    adapters.add_student(STUDENT, rank=32, alpha=64, target_modules=TARGETS, seed=args.seed)
    adapters.add_teacher(TEACHER, TINY / "teachers" / args.task / "lora")
    optimizer = StudentOptimizer(adapters.parameters(STUDENT), lr=1e-3, loss_scale=1e4)
    encoder = load_text_encoder(model, max_sequence_length=14)
    known = load_prompts(TINY / "dataset" / args.task, PROMPT_FORMATS[args.task], "train")
    prompts = known[:: len(known) // args.pictures][: args.pictures]
    recipe = Recipe(schedule("ode", backbone.sigmas(10, 64)), 9)
    x = noise(backbone.latent_shape(64), [(Stream.LATENT, args.seed, 0, i) for i in range(len(prompts))])
    text = Conditions.of(encoder([prompt.text for prompt in prompts]))
    batch = Batch(args.task, TEACHER, 1.0, x, text, draw_noise=lambda step: torch.zeros_like(x))
    return Distiller(Parts(backbone, adapters, optimizer, Conditions.of(encoder([NEGATIVE]))), recipe), batch


def first_noise(backbone: Backbone, batch: Batch, seed: int, index: int) -> Batch:
    """The batch's prompts with the initial noise of training round ``index``."""
    x = noise(backbone.latent_shape(64), [(Stream.LATENT, seed, 1 + index, i) for i in range(len(batch.x))])
    return Batch(batch.task, batch.teacher, batch.teacher_guidance, x, batch.text, batch.draw_noise)


def estimates(
    distiller: Distiller, batch: Batch, level: float, args: argparse.Namespace
) -> Iterator[tuple[int, Transition, Estimate]]:
    """The chosen steps of one flow-SDE trajectory of the student at this noise level."""
    backbone, parameters = distiller.backbone, distiller.optimizer.parameters
    shape, pictures = batch.x.shape[1:], range(len(batch.x))

    def policy(adapter: str) -> Velocity:
        def velocity(x: Tensor, sigma: float) -> Tensor:
            distiller.adapters.use(adapter)
            return backbone.velocity(x, sigma, batch.text)[0]

        return velocity

    def walked(step: int) -> Tensor:
        return noise(shape, [(Stream.STEP, args.seed, i, step) for i in pictures])

    transitions = schedule("flow_sde", backbone.sigmas(10, 64), level)
    for visit in list(walk(batch.x, transitions, policy(STUDENT), draw_noise=walked)):
        if visit.step in args.steps:

            def draw(purpose: int, k: int, step: int = visit.step) -> Tensor:
                return noise(shape, [(Stream.FORWARD, args.seed, i, step, purpose, k) for i in pictures])

            with torch.no_grad():
                v_teacher = policy(TEACHER)(visit.x, visit.transition.sigma)
            v_student = policy(STUDENT)(visit.x, visit.transition.sigma)
            yield (
                visit.step,
                visit.transition,
                measure(visit.transition, visit.x, v_student, v_teacher, parameters, draw, args.draws, args.probes),
            )


def write(args: argparse.Namespace, states: Sequence[dict[str, object]], seconds: float) -> None:
    """The figures with the command that makes them."""
    settings = {key: value for key, value in vars(args).items() if key != "output"}
    options = [f"--{key} {shlex.join(map(str, v if isinstance(v, list) else [v]))}" for key, v in settings.items()]
    result = {
        "command": " ".join(["python experiments/claims/variance.py", *options]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, one thread, torch {torch.__version__}",
        "seconds": round(seconds, 1),
        "settings": settings,
        "states": states,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{seconds:.0f} s; wrote {args.output}")


if __name__ == "__main__":
    main()
