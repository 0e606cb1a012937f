"""How large a round's gradient is against AdamW's epsilon.

    python experiments/gradient_scale.py                                  the embedded tiny world
    python experiments/gradient_scale.py --random sd35 --resolution 256 --batch_size 1   SD3.5-Medium's shape (13 GiB)

Prints the root mean square over all trained values of the gradient of the unscaled loss, the share of an AdamW
update that epsilon 1e-8 takes away at that size, and the relative gap ``|v_S - v_T| / |v_T|`` behind it: the
gradient is proportional to the gap, so that a figure from random weights can be carried over to real ones.
"""

# ruff: noqa: E402

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from anywhere

import torch

from benchmarks.world import World, add_flags, recorded
from diffusionopd.losses import distillation_loss

EPSILON = 1e-8


def main() -> None:
    """Measure one round and print its figures."""
    args = parse()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    (algorithm, batches), gaps = World(args).setup(), []
    transitions = algorithm.transitions[: World(args).sampler.trained_steps]
    if args.random:  # one step of middling length stands for the round: all steps of a CPU run would take half an hour
        transitions = [transitions[(args.steps - 1) // 2]]
    optimizer, started = algorithm.optimizer, time.perf_counter()
    for batch in batches:
        x = batch.noise
        for transition in transitions:
            v_teacher = algorithm.teacher(batch)(x, transition.sigma)
            v_student = algorithm.student(batch)(x, transition.sigma)
            loss = distillation_loss(transition, v_student, v_teacher).mean()
            optimizer.backward(loss / (len(batches) * len(transitions)))
            gaps.append(((v_student - v_teacher).norm() / v_teacher.norm()).item())
            x = transition.sample(x, v_student.detach(), None)
    # A fresh student's lora_A has no gradient yet (lora_B is zero): it must not dilute the figure.
    gradients = [p.grad for p in optimizer.parameters if p.grad is not None and p.grad.any()]
    total = sum(g.numel() for g in gradients)
    rms = (sum(g.double().square().sum().item() for g in gradients) / total) ** 0.5 / optimizer.loss_scale
    result = {
        "gradient_rms": rms,
        "taken_by_epsilon": EPSILON / (rms + EPSILON),
        "relative_gap": sum(gaps) / len(gaps),
        "last_loss": loss.item(),
        "trained_values": total,
        "seconds": time.perf_counter() - started,
        "settings": recorded(args),
    }
    print(f"gradient RMS {rms:.3g}: epsilon {EPSILON:g} takes {100 * result['taken_by_epsilon']:.2g}% of an update")
    print(f"relative gap {result['relative_gap']:.3g}, {total:,} values with a gradient")
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    parser.set_defaults(tasks=1)
    parser.add_argument("--json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
