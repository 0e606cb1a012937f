"""How noisy the PPO-style surrogate's gradient is beside the closed form's, at the same visited states.

    python experiments/claims/variance.py [--draws 64]      a minute or two on one core; writes results/variance.json

At a state that the student visits, the closed form (eq. 11) has one gradient, whatever noise the step draws. That of
the surrogate (section 3.3) is a random vector with the same mean. Over draws of the step's noise this measures, in the
space of the student's LoRA, whether the means agree and how large the variance is, beside what the formula of
docs/method.md predicts. With ``d = (mu_S - mu_T) / s``, ``KL = |d|^2 / 2`` (sums over the ``D`` values of a latent) and
the Jacobian ``J`` of ``v_S`` in the LoRA, one image's gradient is ``b / (s D) (KL + eps.d) J^T eps``, so that

    mean = b / (s D) J^T d,      variance = (b / (s D))^2 ((KL^2 + |d|^2) |J|_F^2 + |J^T d|^2).

``KL^2`` is the score-function noise of which the paper speaks; the rest comes from the advantage's own dependence on
the sample. ``|J|_F^2`` is estimated with random vectors of its own, so that the prediction shares no draw with the
measurement. Variances are traces of covariances; those of a batch of B images are for the mean over the batch.
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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # run as a script from anywhere

import torch
from torch import Tensor

from benchmarks.world import TINY, Setup, assemble
from diffusionopd.data.batches import Batch
from diffusionopd.data.noise import Stream, noise
from diffusionopd.data.prompts import load_prompts
from diffusionopd.losses import distillation_loss, policy_gradient_loss
from diffusionopd.models.backbone import load_backbone, load_text_encoder
from diffusionopd.models.conditions import NEGATIVE, Conditions
from diffusionopd.transitions import Transition, schedule

OUTPUT = Path(__file__).with_name("results") / "variance.json"
CLIP_RANGE = 1e-4
PROMPT_FORMATS = {"compose": "geneval", "ocr": "general_ocr", "scene": "general_ocr"}
DRAW, PROBE = 0, 1  # what random numbers are for
Draw = Callable[[int, int], Tensor]
"""``(DRAW or PROBE, number) -> [B, C, h, w]`` standard normal noise."""


@dataclass(frozen=True)
class Estimate:
    """The surrogate's gradient at one state beside the closed form's; all for the mean over the state's B images."""

    kl: float  # of an image, summed over dimensions
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
    # Each image's part: the batch with zeros in the place of all others.
    alone = torch.eye(len(x), dtype=x.dtype).view(len(x), len(x), *[1] * (x.ndim - 1))
    parts = torch.stack([pulled_back(mask * closed_form) for mask in alone])
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
        """Mean of ``|J^T (scale eps)|^2`` over the probes: ``sum scale^2 |J|_F^2`` over the images."""
        weights = (factor * scale).to(x.dtype).view(-1, *[1] * (x.ndim - 1))
        return fmean(pulled_back(weights * draw(PROBE, k)).square().sum().item() for k in range(probes))

    score_function = in_all_directions(0.5 * squared)
    along = parts.square().sum(1)  # (b / (s D))^2 |J^T d|^2 of each image in the mean over B
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


def expected_cosine(estimate: Estimate, draws: int) -> float:
    """Cosine of the mean of so many draws with the closed form if the error is unbiased and of the predicted size."""
    return 1 / math.sqrt(1 + estimate.predicted / (draws * estimate.closed_squared))


def main() -> None:
    """Measure at a few steps of each noise level, print a table, write the file."""
    args = parse()
    torch.set_num_threads(1)
    started = time.perf_counter()
    setup = build(args)
    batch = setup.batches[0]
    for i in range(args.rounds):
        setup.round([replace(batch, noise=first_noise(setup, args, 1 + i))])
    print(f"{args.task} teacher, student after {args.rounds} rounds, {args.pictures} images, {args.draws} draws")
    print("noise step sigma      KL  noise/signal  measured/predicted  KL^2 part  total/closed  cosine (expected)")
    states = []
    for level in args.levels:
        for step, transition, estimate in estimates(setup, batch, level, args):
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
    parser.add_argument("--pictures", type=int, default=4, help="images, at least 2")
    parser.add_argument("--rounds", type=int, default=5, help="of distillation before the measurement; 0: the base")
    parser.add_argument("--levels", type=float, nargs="+", default=[0.3, 0.7], help="noise levels")
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 2, 4, 6, 8], help="of the 10 of a trajectory")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    return parser.parse_args()


def build(args: argparse.Namespace) -> Setup:
    """The shipped base, its teacher of the task, a fresh student, and training prompts from all over the file."""
    model = str(TINY / "model")
    backbone = load_backbone(model)
    encoder = load_text_encoder(model, max_sequence_length=14)
    backbone.negative = Conditions.of(encoder([NEGATIVE]))
    known = load_prompts(TINY / "dataset" / args.task, PROMPT_FORMATS[args.task], "train")
    prompts = known[:: len(known) // args.pictures][: args.pictures]
    steps, nothing = schedule("ode", backbone.sigmas(10, 64)), torch.zeros(len(prompts), *backbone.latent_shape(64))
    teacher, text = TINY / "teachers" / args.task / "lora", Conditions.of(encoder([prompt.text for prompt in prompts]))
    return assemble(
        backbone,
        [teacher],
        [text],
        [nothing],
        steps,
        9,
        seed=args.seed,
        learning_rate=1e-3,
        fused_optimizer=False,
    )


def first_noise(setup: Setup, args: argparse.Namespace, number: int) -> Tensor:
    """The initial noise of a training round, or with number 0 of the measured trajectory."""
    keys = [(Stream.LATENT, args.seed, number, i) for i in range(args.pictures)]
    return noise(setup.backbone.latent_shape(64), keys)


def estimates(
    setup: Setup, batch: Batch, level: float, args: argparse.Namespace
) -> Iterator[tuple[int, Transition, Estimate]]:
    """The chosen steps of one flow-SDE trajectory of the student at this noise level."""
    x, student, images = first_noise(setup, args, 0), setup.student(batch), range(args.pictures)
    shape = x.shape[1:]
    for step, transition in enumerate(schedule("flow_sde", setup.backbone.sigmas(10, 64), level)):

        def draw(purpose: int, k: int, step: int = step) -> Tensor:
            return noise(shape, [(Stream.FORWARD, args.seed, i, step, purpose, k) for i in images])

        if step in args.steps:
            v_teacher = setup.teacher(batch)(x, transition.sigma)
            v_student = student(x, transition.sigma)
            parameters = setup.optimizer.parameters
            yield (
                step,
                transition,
                measure(transition, x, v_student, v_teacher, parameters, draw, args.draws, args.probes),
            )
        with torch.no_grad():
            walked = noise(shape, [(Stream.STEP, args.seed, i, step) for i in images])
            x = transition.sample(x, student(x, transition.sigma), walked)


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
