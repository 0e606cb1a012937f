"""What every way of training has in common: policies on one backbone, tables of losses, the optimizer step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import torch
from torch import Tensor

from diffusionopd.algorithms.finite import Evaluation, VelocityChecks
from diffusionopd.algorithms.optim import NonFiniteError, StudentOptimizer
from diffusionopd.data.batches import Batch
from diffusionopd.distributed import any_process, by_rank, gather_over_processes, mean_over_processes
from diffusionopd.models.backbone import Backbone
from diffusionopd.models.conditions import TextEmbeddings
from diffusionopd.models.lora import Adapters
from diffusionopd.rollout import Velocity
from diffusionopd.stages import stage
from diffusionopd.transitions import Transition

STUDENT = "student"


@dataclass
class RoundResult:
    """What a round reports. Losses are in the formula's own units, averaged over samples and processes."""

    losses: Tensor  # [batches, supervised steps of each], of the first pass over the round's samples
    grad_norm: float | None  # of the first optimizer step; None without one, and when fp16 overflowed
    pictures: list[tuple[Batch, Tensor]] = field(default_factory=list)  # (batch, final latents [B, C, h, w])
    metrics: dict[str, float] = field(default_factory=dict)  # by name, the same on every process


@dataclass(frozen=True)
class Parts:
    """What every learner is made of."""

    backbone: Backbone
    adapters: Adapters
    optimizer: StudentOptimizer
    negative: TextEmbeddings  # of the empty prompt, batch 1


class Learner:
    """The student beside the other adapters on one backbone; subclasses say what a round is."""

    def __init__(self, parts: Parts, transitions: Sequence[Transition], trained_steps: int) -> None:
        """The first ``trained_steps`` of the sampler's steps are trained."""
        self.backbone = parts.backbone
        self.adapters = parts.adapters
        self.optimizer = parts.optimizer
        self.negative = parts.negative
        self.transitions = transitions
        self.trained_steps = trained_steps
        self.velocities = VelocityChecks()

    def round(self, batches: Sequence[Batch], name: str = "this round", *, step: bool = True) -> RoundResult:
        """Train on the batches of one round; ``name`` is for messages.

        Without ``step`` the round's gradient is kept: the next round that has one steps by the mean over all of them.
        Raises NonFiniteError, before the student changes by it, naming ``name``, task and step.
        """
        raise NotImplementedError

    def finish(self, completed: int) -> None:
        """Called after each round that ended in an optimizer step, with the number of those completed."""

    def state_tensors(self) -> dict[str, Tensor]:
        """What a resume needs beside the student and its optimizer, by name."""
        return {}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restore what :meth:`state_tensors` returned."""

    def _policy(self, adapter: str | None, batch: Batch, guidance_scale: float) -> Velocity:
        def velocity(x: Tensor, sigma: float) -> Tensor:
            with stage(f"forward, {adapter or 'base'}"):
                self.adapters.use(adapter)
                v = self.backbone.velocity(x, sigma, batch.text, guidance_scale, self.negative)
            self.velocities.note(Evaluation(self._policy_name(adapter, batch), batch.task, sigma), v)
            return v

        return velocity

    @staticmethod
    def _policy_name(adapter: str | None, batch: Batch) -> str:
        if adapter is None:
            return BASE
        return TEACHER if adapter == batch.teacher else f"{adapter} policy" if adapter != STUDENT else STUDENT

    def _table(self, batches: Sequence[Batch]) -> Tensor:
        return torch.zeros(len(batches), len(self._steps(batches[0])), device=self.backbone.device)

    def _steps(self, batch: Batch) -> Sequence[int]:
        """The steps that a batch is supervised at, a column of the table each; as many in every batch."""
        return batch.steps or range(self.trained_steps)

    def _step(
        self, batches: Sequence[Batch], losses: Tensor, name: str, step: bool = True
    ) -> tuple[Tensor, float | None]:
        """One optimizer step, if any; the losses' means over processes, on the CPU, and the gradient's norm."""
        losses = mean_over_processes(losses).cpu()
        if not losses.isfinite().all():
            i, column = (int(n) for n in (~losses.isfinite()).nonzero()[0])
            broken = self._steps(batches[i])[column]
            where = f"for task {batches[i].task!r} at step {broken} (sigma {self.transitions[broken].sigma:.4f})"
            self._stop(f"{name}: the loss is {losses[i, column].item()} {where}")
        self.velocities.clear()
        try:
            if step:
                return losses, self.optimizer.step()
            self.optimizer.keep()
            return losses, None
        except NonFiniteError as error:
            raise NonFiniteError(f"{name}: {error}, with finite losses. {_UNCHANGED} {_REMEDIES[STUDENT]}") from error

    def _check_velocities(self, name: str) -> None:
        """Raise NonFiniteError on every process if a velocity noted so far is not finite on any of them."""
        if any_process(int(bool(self.velocities.first_broken()))):
            self._stop(name)

    def _stop(self, what: str) -> NoReturn:
        """Name the velocities that were the first not to be finite, and the ranks that had them; collective."""
        self.optimizer.discard()
        cause = self._described(self.velocities.first_broken())
        self.velocities.clear()
        remedy = by_rank(gather_over_processes([cause])) or _REMEDIES[STUDENT]
        raise NonFiniteError(f"{what}. {_UNCHANGED} {remedy}")

    def _described(self, broken: Sequence[Evaluation]) -> str:
        """What is not finite, where, and the remedy; empty if nothing is."""
        if not broken:
            return ""
        task, sigma = broken[0].task, broken[0].sigma
        steps = [i for i, transition in enumerate(self.transitions) if transition.sigma == sigma]
        where = f"step {steps[0]} (sigma {sigma:.4f})" if steps else f"sigma {sigma:.4f}"
        names = " and the ".join(e.policy for e in broken)
        remedy = _REMEDIES.get(broken[0].policy if len(broken) == 1 else BASE, _REMEDIES[STUDENT])
        return f"the velocity of the {names} for task {task!r} is not finite at {where}. {remedy}"


BASE, TEACHER = "base model", "teacher"
_UNCHANGED = "The student has not been changed by it."
_REMEDIES = {
    TEACHER: "Check that task's LoRA (lora_path in train.teachers), or choose mixed_precision bf16 or no.",
    BASE: "Check the base model (pretrained.model), or choose mixed_precision bf16 or no.",
    STUDENT: "Resume from the last checkpoint with a lower learning rate, or choose mixed_precision bf16 or no.",
}


@dataclass
class Sample:
    """What is kept of a batch between sampling and training: constants, ``[B, C, h, w]``."""

    x0: Tensor  # final latents
    visits: Sequence[tuple[Tensor, Tensor, Tensor]] = ()  # (x, velocity, x_next) of each trained step, where needed


class SampledLearner(Learner):
    """Rounds in two parts: sample everything, then train on it, in one optimizer step or several."""

    def __init__(
        self,
        parts: Parts,
        transitions: Sequence[Transition],
        trained_steps: int,
        *,
        guidance_scale: float = 1.0,
        multistep: bool = False,
        accumulation: int = 0,
        inner_epochs: int = 1,
    ) -> None:
        """As for Learner; ``accumulation`` batches make one optimizer step (0: all of a round), ``inner_epochs`` passes
        over the samples; ``guidance_scale`` is the student's in training, ``multistep`` samples by the second-order
        ODE solver."""
        super().__init__(parts, transitions, trained_steps)
        self.guidance_scale = guidance_scale
        self.multistep = multistep
        self.accumulation = accumulation
        self.inner_epochs = inner_epochs

    def round(self, batches: Sequence[Batch], name: str = "this round", *, step: bool = True) -> RoundResult:
        """Sample, weigh, train. See :meth:`Learner.round`."""
        samples = [self._collect(batch) for batch in batches]
        self._check_velocities(f"{name}, sampling")
        weights, metrics = self._weigh(batches)
        result = RoundResult(self._table(batches), None, metrics=metrics)
        result.pictures = [(b, s.x0) for b, s in zip(batches, samples, strict=True) if b.wants_picture]
        self._begin_training()
        for epoch in range(self.inner_epochs):
            for i, part in enumerate(self._parts(len(batches))):
                losses, norm = self._train(batches, samples, weights, part, f"{name}, optimizer step {i + 1}", step)
                if epoch == 0:
                    result.losses[part] = losses.to(result.losses.device)
                    result.grad_norm = norm if i == 0 else result.grad_norm
        result.losses = result.losses.cpu()
        result.metrics |= self._statistics()
        return result

    def _parts(self, count: int) -> Iterator[list[int]]:
        size = self.accumulation or count
        for start in range(0, count, size):
            yield list(range(start, start + size))

    def _train(
        self,
        batches: Sequence[Batch],
        samples: Sequence[Sample],
        weights: Sequence[Tensor],
        part: list[int],
        name: str,
        step: bool,
    ) -> tuple[Tensor, float | None]:
        own = [batches[i] for i in part]
        losses = self._table(own)
        for row, i in enumerate(part):
            for column in range(self.trained_steps):
                loss = self._loss(batches[i], samples[i], weights[i], column).mean()
                self.optimizer.backward(loss / losses.numel())
                losses[row, column] = loss.detach()
        return self._step(own, losses, name, step)

    # --- what subclasses say ---------------------------------------------------------------------------------------

    def _collect(self, batch: Batch) -> Sample:
        """The samples of one batch, without gradient."""
        raise NotImplementedError

    def _weigh(self, batches: Sequence[Batch]) -> tuple[Sequence[Tensor], dict[str, float]]:
        """A weight for each sample of each batch, ``[B]`` each, and what is to be reported about them."""
        raise NotImplementedError

    def _loss(self, batch: Batch, sample: Sample, weight: Tensor, step: int) -> Tensor:
        """The loss ``[B]`` of one trained step."""
        raise NotImplementedError

    def _begin_training(self) -> None:
        """Called between sampling and training."""

    def _statistics(self) -> dict[str, float]:
        """What was counted while training."""
        return {}
