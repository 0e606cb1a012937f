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
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from anywhere

import torch

from benchmarks.world import World, add_flags, write_figures
from diffusionopd.losses import distillation_loss

EPSILON = 1e-8


def main() -> None:
    """Measure one round and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    parser.set_defaults(tasks=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    world, gaps = World(args), []
    algorithm, batches = world.setup()
    optimizer, steps = algorithm.optimizer, batches[0].steps
    if args.random:  # the first step stands for the round: all steps of a CPU run would take half an hour
        steps = steps[:1]
        batches = [replace(b, rows=tuple(replace(row, steps=steps) for row in b.rows)) for b in batches]
    for _, visit in (trained for batch in batches for trained in algorithm.rollout(batch)):
        assert visit.target is not None
        v, v_teacher = visit.v.guided, visit.target.v_teacher
        loss = distillation_loss(visit.transition, v, v_teacher).mean()
        optimizer.backward(loss / (len(batches) * len(steps)))
        gaps.append(((v - v_teacher).norm() / v_teacher.norm()).item())
    # A fresh student's lora_A has no gradient yet (lora_B is zero): it must not dilute the figure.
    gradients = torch.cat([p.grad.flatten() for p in optimizer.parameters if p.grad is not None and p.grad.any()])
    rms = gradients.double().square().mean().sqrt().item() / optimizer.loss_scale
    taken, gap = EPSILON / (rms + EPSILON), sum(gaps) / len(gaps)
    print(f"gradient RMS {rms:.3g}: epsilon {EPSILON:g} takes {100 * taken:.2g}% of an update")
    print(f"relative gap {gap:.3g}, {len(gradients):,} values with a gradient")
    figures = {"gradient_rms": rms, "taken_by_epsilon": taken, "relative_gap": gap, "last_loss": loss.item()}
    write_figures(args, figures | {"trained_values": len(gradients)})


if __name__ == "__main__":
    main()
