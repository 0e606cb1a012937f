"""What is compared: each arm is a change of one of the tiny world's configurations, or a model that needs no training.

Lengths are chosen for equal cost. A round costs its forward passes of single images, a backward pass counted as two:
DiffusionNFT 192 + 2 x 48 = 288, GRPO-Guard 144 + 2 x 48 = 240, and the distillation 216 + 2 x 108 = 432 for three tasks
(144 a task). So with T tasks the T teachers of 60 NFT rounds cost as much as 60 T rounds of NFT or 72 T of GRPO-Guard,
and the 80 rounds of the distillation as much as 40 T or 48 T.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

TEACHER_ROUNDS, EARLY_TEACHER_ROUNDS = 60, 24
OPD_ROUNDS = 80
REWARDED, SHIPPED = "rewarded", "shipped"
OURS = {"train.target": "velocity", "train.self_normalize": True}
PAPER = {"train.target": "mean", "train.self_normalize": False}
LOSSES = {"opd": ("our loss", OURS), "paper": ("the paper's loss", PAPER)}
GROUPS = {
    "claims": "The paper's claims",
    "strength": "Targets short of the teachers and beyond them",
    "folding": "Guidance folded into the student",
    "start": "A start from the teachers' sum",
    "mixed": "Rewards and teachers together",
    "steps": "Which steps count, and which noise levels",
    "merges": "Merging without training",
}


@dataclass(frozen=True)
class Arm:
    """One line of a table.

    ``kind``: how it is made: ``nft``, ``guard`` (from rewards), ``opd`` (from teachers), ``merge``, ``lora`` (a teacher
    that is there), ``base``; ``again``: the run of arm ``of``, scored at another guidance; ``same``: its very result. ``rounds``: name of each stage at which it is scored -> rounds, the last its end; ``per
    task`` multiplies them by the number of tasks. ``changes``: flat keys of the configuration.
    """

    name: str
    label: str
    group: str
    kind: str
    rounds: Mapping[str, int] = field(default_factory=dict)
    per_task: bool = False
    changes: Mapping[str, Any] = field(default_factory=dict)
    teachers: str = ""
    teacher_rounds: int = TEACHER_ROUNDS
    task: str = ""  # of a teacher
    guidance: float = 1.0  # of evaluations
    merge: tuple[str, float] = ("", 1.0)  # method, scale
    of: str = ""
    choice: str = ""  # of these, validation chooses one, which then has this name

    @property
    def trained(self) -> bool:
        """Whether it has rounds."""
        return bool(self.rounds)

    def stages(self, num_tasks: int) -> dict[str, int]:
        """Stage -> rounds in a world of so many tasks."""
        return {stage: rounds * (num_tasks if self.per_task else 1) for stage, rounds in self.rounds.items()}


def arms(tasks: Sequence[str], shipped: Sequence[str]) -> dict[str, Arm]:
    """Every arm of a world with these tasks, of which some have a teacher that is shipped."""
    every = [*_claims(tasks, shipped), *_targets(bool(shipped)), *_merges(bool(shipped))]
    assert len({arm.name for arm in every}) == len(every)
    return {arm.name: arm for arm in every}


def _claims(tasks: Sequence[str], shipped: Sequence[str]) -> list[Arm]:
    group, end = "claims", {"": OPD_ROUNDS}
    found = [Arm("base", "base", group, "base")]
    teachers = {"early": EARLY_TEACHER_ROUNDS, "": TEACHER_ROUNDS}
    found += [Arm(f"teacher_{t}", f"NFT teacher, {t}", group, "nft", teachers, task=t) for t in tasks]
    found += [Arm(f"shipped_{t}", f"shipped teacher, {t}", group, "lora", task=t) for t in shipped]
    last = tasks[-1]
    found.append(Arm(f"guard_{last}", f"GRPO-Guard teacher, {last}", group, "guard", {"": TEACHER_ROUNDS}, task=last))
    # Learning rates: as many for each method, chosen on validation. The teachers' own is 2e-3, the distillation's 1e-3.
    guard, nft = ({"alone": 48, "teachers": 72, "": 120}, {"alone": 40, "teachers": 60, "": 100})
    rivals: list[tuple[str, str, str, Mapping[str, int], dict[str, Any], tuple[float, ...]]] = [
        ("multitask_nft", "multi-task NFT", "nft", nft, {"train.task_order": "alternate"}, (5e-4, 1e-3, 2e-3)),
        ("multitask_guard", "multi-task GRPO-Guard", "guard", guard, {"train.task_order": "alternate"}, (3e-4, 5e-4, 1e-3)),
        ("cascade_nft", "cascade NFT", "nft", {"": 100}, {"train.task_order": "cascade"}, (5e-4, 1e-3, 2e-3)),
        ("cascade_alone", "cascade NFT, at the distillation's cost", "nft", {"": 40}, {"train.task_order": "cascade"}, (5e-4, 1e-3, 2e-3)),
    ]  # fmt: skip
    for name, label, kind, rounds, changes, rates in rivals:
        found += [
            Arm(f"{name}_{rate:g}", f"{label}, rate {rate:g}", group, kind, rounds, True,
                {**changes, "train.learning_rate": rate}, choice=name)
            for rate in rates
        ]  # fmt: skip
    for name, (label, loss) in LOSSES.items():
        rounds = {"": OPD_ROUNDS} if name == "opd" else {"80": OPD_ROUNDS, "": 2 * OPD_ROUNDS}
        found += [
            Arm(f"{name}_{rate:g}", f"DiffusionOPD, {label}, rate {rate:g}", group, "opd", rounds,
                changes={**loss, "train.learning_rate": rate, "eval_freq": 5}, teachers=REWARDED, choice=name)
            for rate in (5e-4, 1e-3, 2e-3)
        ]  # fmt: skip
    # Noise and estimators, with the paper's loss, all at one rate
    found.append(Arm("closed_0", "the paper's loss, closed form, ODE", group, "same", of="paper_0.001"))
    kinds = {"closed": ("closed form", {}), "plain": ("PPO-style", {"train.loss": "policy_gradient"})}
    kinds["centred"] = "PPO-style, baseline subtracted", {"train.loss": "policy_gradient", "train.baseline": True}
    for name, (label, loss) in kinds.items():
        for noise in (0.3, 0.7):
            rounds = {"80": OPD_ROUNDS, "": 2 * OPD_ROUNDS} if name == "closed" else end
            changes = {**PAPER, **loss, "sample.noise_level": noise, "eval_freq": 5}
            text = f"the paper's loss, {label}, noise {noise:g}"
            found.append(Arm(f"{name}_{noise:g}", text, group, "opd", rounds, changes=changes, teachers=REWARDED))
    found.append(Arm("sft", "SFT on the teachers' samples", group, "opd", end,
                     changes={"train.algorithm": "sft"}, teachers=REWARDED))  # fmt: skip
    return found


def _targets(shipped: bool) -> list[Arm]:
    end, found = {"": OPD_ROUNDS}, []
    for loss, (label, changes) in LOSSES.items():
        for rounds in (EARLY_TEACHER_ROUNDS, TEACHER_ROUNDS):
            for strength in (0.75, 1.0, 1.25, 1.5, 2.0):
                name = f"strength_{loss}_{rounds}_{strength:g}"
                text = f"{label}, teachers of {rounds} rounds, strength {strength:g}"
                if strength == 1 and rounds == TEACHER_ROUNDS:
                    same = f"{loss}_0.001" if loss == "opd" else f"{loss}_0.001.80"
                    found.append(Arm(name, text, "strength", "same", of=same))
                    continue
                found.append(Arm(name, text, "strength", "opd", end, changes={**changes, "strength": strength},
                                 teachers=REWARDED, teacher_rounds=rounds))  # fmt: skip
    for name, label, changes in (
        ("unfolded", "student and teachers at guidance 2",
         {"train.cfg": True, "sample.guidance_scale": 2.0, "guidance_scale": 2.0}),
        ("folded", "student without guidance, teachers at 2", {"guidance_scale": 2.0}),
    ):  # fmt: skip
        found += [
            Arm(name, f"{label}, used at 1", "folding", "opd", end, changes=OURS | changes, teachers=REWARDED),
            Arm(f"{name}_at2", f"{label}, used at 2", "folding", "again", of=name, guidance=2.0),
        ]
    often = {**OURS, "eval_freq": 2, "train.lora_rank": 48, "train.lora_alpha": 96}
    for teachers in (REWARDED, SHIPPED) if shipped else (REWARDED,):
        found.append(Arm(f"fresh_{teachers}", f"{teachers} teachers, fresh", "start", "opd", {"": 40}, changes=often, teachers=teachers))  # fmt: skip
        for rank, scale in ((8, 0.0), (16, 0.0), (48, 0.0), (48, 0.5), (48, 1.0)):
            text = f"{teachers} teachers, their sum, rank {rank}, " + (f"times {scale:g}" if scale else "scale by the loss")
            changes = often | {"train.student_init": "teachers", "train.student_init_scale": scale}
            changes |= {"train.lora_rank": rank, "train.lora_alpha": 2 * rank}
            found.append(Arm(f"summed_{teachers}_{rank}_{scale:g}", text, "start", "opd", {"": 40}, changes=changes, teachers=teachers))  # fmt: skip
    for weight in (0.1, 1.0, 10.0):
        changes = OURS | {"train.distill_weight": weight, "train.task_order": "alternate", "train.learning_rate": 1e-3}
        found.append(Arm(f"mixed_{weight:g}", f"multi-task NFT + {weight:g} x distillation", "mixed", "nft",
                         {"": 20}, True, changes, REWARDED))  # fmt: skip
    three = {"train.steps_per_rollout": 3}
    steps: dict[str, tuple[str, dict[str, Any]]] = {
        "uniform": ("3 of 9 steps, uniformly", three),
        "late": ("3 of 9 steps, near the data", three | {"train.step_weighting": "beta(5, 2)"}),
        "early": ("3 of 9 steps, near the noise", three | {"train.step_weighting": "beta(2, 5)"}),
        "corrected": ("3 of 9 steps, near the data, corrected", three | {"train.step_weighting": "beta(5, 2)", "train.step_correction": True}),
        "linspace": ("all steps, levels of linspace", {"sample.schedule": "linspace"}),
    }  # fmt: skip
    for name, (label, changes) in steps.items():
        found.append(Arm(f"steps_{name}", label, "steps", "opd", end, changes=OURS | changes, teachers=REWARDED))
    return found


def _merges(shipped: bool) -> list[Arm]:
    scales = {"sum": (0.2, 0.4, 0.6, 0.8, 1.0), "ties": (0.5, 1.0, 2.0), "dare": (0.5, 1.0)}
    return [
        Arm(f"merge_{teachers}_{method}_{scale:g}", f"{method} of the {teachers} teachers, times {scale:g}", "merges",
            "merge", teachers=teachers, merge=(method, scale), choice=f"{method}_{teachers}")
        for teachers in ((REWARDED, SHIPPED) if shipped else (REWARDED,))
        for method, own in scales.items()
        for scale in own
    ]  # fmt: skip
