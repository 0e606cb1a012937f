"""What is compared: each arm is a change of one of the tiny world's configurations, or a model that needs no training.

Lengths are chosen for equal cost. A round costs its forward passes of single images, a backward pass counted as two:
DiffusionNFT 192 + 2 x 48 = 288, GRPO-Guard 144 + 2 x 48 = 240, and the distillation 216 + 2 x 108 = 432 for three tasks
(144 a task). So with T tasks the T teachers of 60 NFT rounds cost as much as 60 T rounds of NFT or 72 T of GRPO-Guard,
and the 80 rounds of the distillation as much as 40 T or 48 T.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

TEACHER_ROUNDS, EARLY_TEACHER_ROUNDS = 60, 24
OPD_ROUNDS = 80
REWARDED, SHIPPED = "rewarded", "shipped"
EARLY, AT_TEACHERS, HALF = "early", "teachers", "80"
"""Stages: of a teacher, after fewer rounds; of multi-task RL, at the cost of all teachers together; of the method, at
the rounds of its baselines' cost, of twice as many."""
OURS = {"train.target": "velocity", "train.self_normalize": True}
PAPER = {"train.target": "mean", "train.self_normalize": False}
LOSSES = {"opd": ("our loss", OURS), "paper": ("the paper's loss", PAPER)}
STRENGTHS, FEW = (0.75, 1.0, 1.25, 1.5, 2.0), (0.75, 1.0, 1.5)
RATES = {
    "multitask_nft": (5e-4, 1e-3, 2e-3, 4e-3),
    "multitask_guard": (3e-4, 5e-4, 1e-3, 2e-3),
    "cascade_nft": (2.5e-4, 5e-4, 1e-3, 2e-3),
    "cascade_alone": (5e-4, 1e-3, 2e-3, 4e-3),
    "opd": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2),
    "paper": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2),
    "sft": (1e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2),
    "closed": (1e-3, 4e-3, 8e-3, 1.6e-2),
    "plain": (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3),
    "centred": (1e-3, 2e-3, 4e-3),
}
"""Learning rates tried (the teachers' own: 2e-3): three, and more where validation chose the edge of them."""
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
    that is there), ``base``; ``again``: the run of arm ``of``, scored at another guidance; ``same``: its very result.
    ``rounds``: name of each stage at which it is scored -> rounds, the last its end, in a world with T tasks times T
    where ``per_task``. ``changes``: flat keys of the configuration.
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
    def decisive(self) -> str:
        """The last stage at which it is compared with the others of its choice: all are trained to it, one beyond."""
        return next((stage for stage in (AT_TEACHERS, HALF) if stage in self.rounds), "")

    def chosen_at(self, stage: str) -> str:
        """The stage by whose validation scores one of the choice is taken at ``stage``: its own, or the decisive one
        beyond that."""
        beyond = self.rounds.get(stage, 0) > self.rounds.get(self.decisive, 0)
        return self.decisive if beyond else stage

    @property
    def digest(self) -> str:
        """Of what decides its result, but rounds, world and seed."""
        own = (self.kind, dict(self.changes), self.teachers, self.teacher_rounds, self.task, self.guidance, self.merge)
        return hashlib.sha256(json.dumps([*own, self.of], sort_keys=True).encode()).hexdigest()[:12]

    @property
    def trained(self) -> bool:
        """Whether it has rounds."""
        return bool(self.rounds)

    def stages(self, num_tasks: int) -> dict[str, int]:
        """Stage -> rounds in a world of so many tasks."""
        return {stage: rounds * (num_tasks if self.per_task else 1) for stage, rounds in self.rounds.items()}


def arms(tasks: Sequence[str], shipped: Sequence[str], rate: float) -> dict[str, Arm]:
    """Every arm of a world with these tasks, of which some have a teacher that is shipped.

    ``rate``: of the method where no other is tried. Where all teachers are shipped, targets and steps are varied in
    full; elsewhere a few of them show whether it is alike.
    """
    full = len(shipped) == len(tasks)
    kinds = (REWARDED, SHIPPED) if full else (REWARDED,)
    every = [
        *_models(tasks, shipped),
        *_baselines(),
        *_distilled(),
        *_estimators(),
        *(
            _strengths((EARLY_TEACHER_ROUNDS, TEACHER_ROUNDS), STRENGTHS)
            if full
            else _strengths((TEACHER_ROUNDS,), FEW)
        ),
        *_folded(),
        *(arm for teachers in kinds for arm in _starts(teachers)),
        *_mixed(),
        *(_steps() if full else ()),
        *(arm for teachers in kinds for arm in _merges(teachers)),
    ]
    assert len({arm.name for arm in every}) == len(every)
    at_rate = {"train.learning_rate": rate}
    return {a.name: replace(a, changes={**at_rate, **a.changes}) if a.kind == "opd" else a for a in every}


def _opd(name: str, label: str, group: str, changes: Mapping[str, Any], rounds: int = OPD_ROUNDS, **more: Any) -> Arm:
    return Arm(name, label, group, "opd", {"": rounds}, changes=changes, **{"teachers": REWARDED, **more})


def _models(tasks: Sequence[str], shipped: Sequence[str]) -> Iterator[Arm]:
    group, rounds = "claims", {EARLY: EARLY_TEACHER_ROUNDS, "": TEACHER_ROUNDS}
    yield Arm("base", "base", group, "base")
    yield from (Arm(f"teacher_{t}", f"NFT teacher, {t}", group, "nft", rounds, task=t) for t in tasks)
    yield from (Arm(f"shipped_{t}", f"shipped teacher, {t}", group, "lora", task=t) for t in shipped)
    yield Arm(f"guard_{tasks[-1]}", f"GRPO-Guard teacher, {tasks[-1]}", group, "guard", {"": 60}, task=tasks[-1])


def _baselines() -> Iterator[Arm]:
    """One student from all rewards."""
    turns, one_by_one = {"train.task_order": "alternate"}, {"train.task_order": "cascade"}
    nft, guard = {"alone": 40, AT_TEACHERS: 60, "": 100}, {"alone": 48, AT_TEACHERS: 72, "": 120}
    for name, label, kind, rounds, changes in (
        ("multitask_nft", "multi-task NFT", "nft", nft, turns),
        ("multitask_guard", "multi-task GRPO-Guard", "guard", guard, turns),
        ("cascade_nft", "cascade NFT", "nft", {"": 100}, one_by_one),
        ("cascade_alone", "cascade NFT at the distillation's cost", "nft", {"": 40}, one_by_one),
    ):
        for rate in RATES[name]:
            own = {**changes, "train.learning_rate": rate}
            yield Arm(f"{name}_{rate:g}", f"{label}, rate {rate:g}", "claims", kind, rounds, True, own, choice=name)


def _distilled() -> Iterator[Arm]:
    """The method with both losses, and supervision."""
    for loss, (label, changes) in LOSSES.items():
        rounds = {HALF: OPD_ROUNDS, "": 2 * OPD_ROUNDS}
        for rate in RATES[loss]:
            own = {**changes, "train.learning_rate": rate, "eval_freq": 10}
            text = f"DiffusionOPD, {label}, rate {rate:g}"
            yield Arm(f"{loss}_{rate:g}", text, "claims", "opd", rounds, changes=own, teachers=REWARDED, choice=loss)
    for rate in RATES["sft"]:
        own = {"train.algorithm": "sft", "train.learning_rate": rate}
        yield _opd(f"sft_{rate:g}", f"SFT on the teachers' samples, rate {rate:g}", "claims", own, choice="sft")


def _estimators() -> Iterator[Arm]:
    """Noise and estimators, with the paper's loss."""
    yield Arm("closed_0", "the paper's loss, closed form, ODE", "claims", "same", of="paper")
    surrogate, twice = {"train.loss": "policy_gradient"}, {HALF: OPD_ROUNDS, "": 2 * OPD_ROUNDS}
    for noise in (0.3, 0.7):
        for kind, label, changes, rounds in (
            ("closed", "the paper's loss, closed form", {}, twice),
            ("plain", "PPO-style", surrogate, {"": OPD_ROUNDS}),
            ("centred", "PPO-style, baseline subtracted", surrogate | {"train.baseline": True}, {"": OPD_ROUNDS}),
        ):
            choice = f"{kind}_{noise:g}"
            for rate in RATES[kind]:
                own = {**PAPER, **changes, "sample.noise_level": noise, "train.learning_rate": rate}
                name, text = f"{choice}_{rate:g}", f"{label}, noise {noise:g}, rate {rate:g}"
                yield Arm(name, text, "claims", "opd", rounds, changes=own, teachers=REWARDED, choice=choice)


def _strengths(teacher_rounds: Sequence[int], strengths: Sequence[float]) -> Iterator[Arm]:
    for loss, (label, changes) in LOSSES.items():
        for rounds in teacher_rounds:
            for strength in strengths:
                name = f"strength_{loss}_{rounds}_{strength:g}"
                text = f"{label}, teachers of {rounds} rounds, strength {strength:g}"
                if (strength, rounds) == (1.0, TEACHER_ROUNDS):
                    yield Arm(name, text, "strength", "same", of=f"{loss}.{HALF}")
                else:
                    own = {**changes, "strength": strength}
                    yield _opd(name, text, "strength", own, teacher_rounds=rounds)


def _folded() -> Iterator[Arm]:
    guided = {"train.cfg": True, "sample.guidance_scale": 2.0}
    for loss, (label, changes) in LOSSES.items():
        for name, text, own in (
            ("unfolded", "student and teachers at guidance 2", guided),
            ("folded", "student without guidance, teachers at 2", {}),
        ):
            text = f"{label}, {text}"
            yield _opd(f"{name}_{loss}", f"{text}, used at 1", "folding", {**changes, **own, "guidance_scale": 2.0})
            again = f"{name}_{loss}_at2"
            yield Arm(again, f"{text}, used at 2", "folding", "again", of=f"{name}_{loss}", guidance=2.0)


def _starts(teachers: str) -> Iterator[Arm]:
    for loss, (label, changes) in LOSSES.items():
        for rank, scale in ((48, None), (16, 0.0), (32, 0.0), (48, 0.0), (48, 1.0)):
            own = {**changes, "eval_freq": 4, "train.lora_rank": rank, "train.lora_alpha": 2 * rank}
            name, text = f"fresh_{teachers}_{loss}", f"{label}, {teachers} teachers, fresh, rank {rank}"
            if scale is not None:
                own |= {"train.student_init": "teachers", "train.student_init_scale": scale}
                how = f"times {scale:g}" if scale else "scale by the loss"
                name = f"summed_{teachers}_{loss}_{rank}_{scale:g}"
                text = f"{label}, {teachers} teachers, their sum, rank {rank}, {how}"
            if loss == "opd" or rank == 48 and not scale:
                yield _opd(name, text, "start", own, rounds=40, teachers=teachers)


def _mixed() -> Iterator[Arm]:
    for loss, (label, changes) in LOSSES.items():
        for weight in (0.1, 1.0, 10.0) if loss == "opd" else (1.0,):
            own = {**changes, "train.distill_weight": weight, "train.task_order": "alternate"}
            text = f"multi-task NFT + {weight:g} x distillation, {label}"
            own["train.learning_rate"] = 1e-3
            yield Arm(f"mixed_{loss}_{weight:g}", text, "mixed", "nft", {"": 20}, True, own, REWARDED)


def _steps() -> Iterator[Arm]:
    three, late = {"train.steps_per_rollout": 3}, {"train.step_weighting": "beta(5, 2)"}
    every: dict[str, tuple[str, dict[str, Any]]] = {
        "uniform": ("3 of 9 steps, uniformly", three),
        "late": ("3 of 9 steps, near the data", three | late),
        "early": ("3 of 9 steps, near the noise", three | {"train.step_weighting": "beta(2, 5)"}),
        "corrected": ("3 of 9 steps, near the data, corrected", three | late | {"train.step_correction": True}),
        "linspace": ("all steps, levels of linspace", {"sample.schedule": "linspace"}),
    }
    for loss, (label, changes) in LOSSES.items():
        for name, (text, own) in every.items():
            yield _opd(f"steps_{loss}_{name}", f"{label}, {text}", "steps", {**changes, **own})


def _merges(teachers: str) -> Iterator[Arm]:
    for method, scales in {"sum": (0.2, 0.4, 0.6, 0.8, 1.0), "ties": (0.5, 1.0, 2.0), "dare": (0.5, 1.0, 2.0)}.items():
        for scale in scales:
            name, text = f"merge_{teachers}_{method}_{scale:g}", f"{method} of the {teachers} teachers, times {scale:g}"
            choice = f"{method}_{teachers}"
            yield Arm(name, text, "merges", "merge", teachers=teachers, merge=(method, scale), choice=choice)
