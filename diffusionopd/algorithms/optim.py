"""The optimizer step of a round, or of several: scaled backward, one all-reduce, clipping, the rate, AdamW, EMA."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from diffusionopd.config_schema import FREE, Problems, key
from diffusionopd.distributed import average_gradients
from diffusionopd.stages import stage


class NonFiniteError(ValueError):
    """A velocity, loss or gradient is NaN or infinite; the student has not been touched by it."""


SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine")


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW."""

    learning_rate: float = key("train.learning_rate", 3e-4, "(0, inf)", resume=FREE)
    """Of AdamW."""
    lr_scheduler: str = key("train.lr_scheduler", "constant", choices=SCHEDULES, resume=FREE)
    """What the learning rate does over the optimizer steps of `num_epochs` rounds (`diffusers.optimization`): stays
    ("constant"), stays after the warm-up ("constant_with_warmup"), or falls to 0 after it ("linear", "cosine"). `lr`
    in metrics.jsonl is that of a round's last step."""
    lr_warmup_steps: int = key("train.lr_warmup_steps", 0, "[0, inf)", resume=FREE)
    """Optimizer steps over which the rate rises in proportion, from 0 at the first; not with "constant"."""
    adam_beta1: float = key("train.adam_beta1", 0.9, "[0, 1)")
    """Of AdamW."""
    adam_beta2: float = key("train.adam_beta2", 0.999, "[0, 1)")
    """Of AdamW."""
    adam_weight_decay: float = key("train.adam_weight_decay", 1e-4, "[0, inf)")
    """Of AdamW."""
    adam_epsilon: float = key("train.adam_epsilon", 1e-8, "(0, inf)")
    """Of AdamW."""
    fused_optimizer: bool = key("train.fused_optimizer", True, resume=FREE)
    """AdamW and the moving average in a few CUDA kernels for all tensors together; the same to rounding."""
    use_8bit_adam: bool = key("train.use_8bit_adam", False)
    """AdamW with 8-bit state (needs bitsandbytes and a GPU)."""
    max_grad_norm: float = key("train.max_grad_norm", 1.0, "(0, inf)", resume=FREE)
    """Norm to which the gradient of a round is clipped, in units of the loss as it is."""
    loss_scale: float = key("train.loss_scale", 1e4, "(0, inf)", resume=FREE)
    """The loss is multiplied by this before the backward pass, so that the gradient is large against `adam_epsilon`
    (measured in docs/method.md); the logged loss and gradient norm, and `max_grad_norm`, are in units of the loss as
    it is."""

    def check(self, problems: Problems) -> None:
        """A warm-up needs a schedule that has one."""
        if self.lr_warmup_steps and self.lr_scheduler == "constant":
            remedy = 'Set train.lr_scheduler to "constant_with_warmup", or this to 0.'
            problems.add("train.lr_warmup_steps", f'is {self.lr_warmup_steps}, which "constant" does not have', remedy)

    def rates(self, num_steps: int) -> Callable[[int], float]:
        """The learning rate of each of a run's ``num_steps`` optimizer steps, counted from 0."""
        stand_in = torch.optim.SGD([torch.zeros(1)], lr=self.learning_rate)
        warmup = self.lr_warmup_steps
        schedule = get_scheduler(self.lr_scheduler, stand_in, num_warmup_steps=warmup, num_training_steps=num_steps)
        (factor,) = schedule.lr_lambdas
        return lambda step: self.learning_rate * factor(step)


@dataclass(frozen=True)
class EmaSettings:
    """The average of the student."""

    ema: bool = key("train.ema", False, resume=FREE)
    """Average the student's weights over optimizer steps; evaluation and the saved LoRA use the average."""
    ema_decay: float = key("train.ema_decay", 0.9, "[0, 1)", resume=FREE)
    """After optimizer step n the average keeps min((1 + n) / (10 + n), ema_decay) of itself, if n + 1 is a multiple of
    `ema_interval`."""
    ema_interval: int = key("train.ema_interval", 8, "[1, inf)", resume=FREE)
    """See `train.ema_decay`."""
    ema_repeats: int = key("train.ema_repeats", 0, "[0, inf)", resume=FREE)
    """How often that is done in a row, with the same weights. 0 does what the published code does, once for each of a
    process's batches in an optimizer step (`num_batches_per_epoch`, if a round has one step), and for nft once: the
    average is then about 25 rounds old in config/opd.py:mopd, with 1 it would be 75 (docs/method.md)."""


class StudentOptimizer:
    """AdamW with a constant loss scale, dynamic scaling for fp16 and gradient clipping over the student's tensors.

    ``steps``, the optimizer steps done, is set by whoever resumes: the learning rate and the average follow from it.

    ``loss_scale`` multiplies every loss before backward. A mean over latent dimensions, steps and samples leaves
    gradients so small that AdamW's epsilon would swallow them (``docs/method.md`` has the figures); apart from epsilon
    AdamW does not see the factor. Whatever this class reports, and the clipping threshold, are in the units of the
    unscaled loss.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        settings: OptimizerSettings,
        dynamic_scale: bool = False,
        *,
        num_steps: int = 1,
        ema: Ema | None = None,
    ) -> None:
        """``num_steps``: optimizer steps of the whole run, for the schedule; ``ema`` is updated after each."""
        self.parameters = list(parameters)
        self.steps, self.ema = 0, ema
        self._rate = settings.rates(num_steps)
        self.max_grad_norm, self.loss_scale = settings.max_grad_norm, settings.loss_scale
        options: dict[str, Any] = {
            "lr": settings.learning_rate,
            "betas": (settings.adam_beta1, settings.adam_beta2),
            "weight_decay": settings.adam_weight_decay,
            "eps": settings.adam_epsilon,
        }
        if not settings.use_8bit_adam:  # which has CUDA kernels of its own
            options["fused"] = settings.fused_optimizer
        self._adamw = _adamw_class(settings.use_8bit_adam)(self.parameters, **options)
        device = self.parameters[0].device.type
        self._scaler = torch.amp.GradScaler(device, enabled=dynamic_scale)
        self._kept = 0  # rounds whose gradients wait for the step of a later one

    @property
    def lr(self) -> float:
        """The learning rate of the last step; of the next before any, and while gradients wait for it."""
        return self._rate(self.steps if self._kept else max(self.steps - 1, 0))

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of a scalar loss."""
        with stage("backward"):
            self._scaler.scale(loss * self.loss_scale).backward()

    def keep(self) -> None:
        """End a round without a step: average gradients over processes and leave them for the next :meth:`step`.

        They are then the same on every process, so one of them can save them. Raises NonFiniteError for a NaN or
        infinite gradient; with fp16's dynamic scale it is found at the step.
        """
        with stage("averaging the gradient"):
            average_gradients(self.parameters)
        self._kept += 1
        norm = torch.nn.utils.get_total_norm(self._gradients()).item()
        if not math.isfinite(norm) and not self._scaler.is_enabled():
            self.discard()
            raise NonFiniteError(f"the gradient's norm is {norm}")

    def step(self) -> float | None:
        """Average gradients over processes, clip, step, and clear them. Returns the gradient's norm before clipping.

        After rounds that were kept it is the step of their mean, this one included. Raises NonFiniteError, before the
        student changes, for a NaN or infinite gradient. With fp16's dynamic scale an overflow is ordinary: the step is
        skipped, though counted, the scale halves, and None is returned; it raises once the scale is below 1, where the
        gradient itself must be broken.
        """
        with stage("optimizer step"):
            norm = self._step()
            self.steps += 1
            if self.ema is not None:
                self.ema.update(self.steps)
        return norm

    def _step(self) -> float | None:
        for group in self._adamw.param_groups:
            group["lr"] = self._rate(self.steps)
        average_gradients(self.parameters)
        self._scaler.unscale_(self._adamw)
        gradients = self._gradients()
        if self._kept:
            torch._foreach_div_(gradients, float(self._kept + 1))
        norm = torch.nn.utils.get_total_norm(gradients).item() / self.loss_scale
        if not math.isfinite(norm):
            self._overflow(norm)
            return None
        if norm > self.max_grad_norm:
            # torch's clipping adds 1e-6 to the norm, which is more than these norms can be.
            torch._foreach_mul_(gradients, self.max_grad_norm / norm)
        self._scaler.step(self._adamw)
        self._scaler.update()
        self.discard()
        return norm

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.parameters if p.grad is not None]

    def _overflow(self, norm: float) -> None:
        self._scaler.update()
        self.discard()
        if not self._scaler.is_enabled() or self._scaler.get_scale() < 1.0:
            raise NonFiniteError(f"the gradient's norm is {norm}")

    def discard(self) -> None:
        """Forget accumulated gradients without a step."""
        self._adamw.zero_grad(set_to_none=True)
        self._kept = 0

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything that the next step depends on besides the parameters, by name."""
        tensors = {}
        for i, parameter in enumerate(self.parameters):
            for name, value in self._adamw.state.get(parameter, {}).items():
                tensors[f"optimizer.{i}.{name}"] = torch.as_tensor(value)
            if self._kept and parameter.grad is not None:
                tensors[f"optimizer.{i}.{_GRADIENT}"] = parameter.grad
        return tensors

    def state_scalars(self) -> dict[str, float]:
        """Steps done, the loss scale, the state of the dynamic one, and what multiples kept gradients are."""
        scalars = {"steps": self.steps, "loss_scale": self.loss_scale, **self._scaler.state_dict()}
        return scalars | {"kept": self._kept, "gradient_scale": self._scale()} if self._kept else scalars

    def _scale(self) -> float:
        return self.loss_scale * self._scaler.get_scale()

    def load_state(self, tensors: dict[str, Tensor], scalars: dict[str, float]) -> None:
        """Restore what the two methods above returned, in units of this loss scale, which may be another."""
        state: dict[int, dict[str, Any]] = {}
        ratio = self.loss_scale / scalars["loss_scale"]
        for place, value in tensors.items():
            _, index, name = place.split(".", 2)
            if value.is_floating_point():
                value = value * ratio ** _POWERS.get(name, 0)
            # The 8-bit optimizer counts in whole numbers, and does not take a tensor.
            state.setdefault(int(index), {})[name] = int(value) if value.dtype == torch.int64 else value
        gradients = {i: own.pop(_GRADIENT) for i, own in state.items() if _GRADIENT in own}
        groups = self._adamw.state_dict()["param_groups"]
        self._adamw.load_state_dict({"state": {i: own for i, own in state.items() if own}, "param_groups": groups})
        if "scale" in scalars and self._scaler.is_enabled():
            self._scaler.load_state_dict(scalars)
        self.steps = int(scalars["steps"])
        self._kept = int(scalars.get("kept", 0))
        for i, gradient in gradients.items():
            parameter = self.parameters[i]
            # The saved scale is another one after a change of train.loss_scale.
            parameter.grad = (gradient * (self._scale() / scalars["gradient_scale"])).to(parameter.device)


_GRADIENT = "gradient"  # among AdamW's own names
_POWERS = {"exp_avg": 1, "exp_avg_sq": 2, "state1": 1, "state2": 2, "absmax1": 1, "absmax2": 2}
"""Of the gradient's unit in AdamW's moments, and in those of the 8-bit one: small tensors whole, of others the largest
values of blocks."""


class Ema:
    """Exponential moving average of the student, as the published code keeps it (diffusers' EMAModel does the work).

    There the average is called after every batch, with the number n of optimizer steps done, and acts when n + 1 is a
    multiple of ``interval``: ``repeats`` times with the same weights, if a step has so many batches, of which all but
    the first come with the batches of the next step. Here all are applied at once.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        decay: float,
        interval: int,
        repeats: int = 1,
        fused: bool = False,
    ) -> None:
        """``fused`` updates all tensors in a few kernels: the same to rounding."""
        self.parameters = list(parameters)
        self.interval, self.repeats = interval, repeats
        self._model = EMAModel(self.parameters, decay=decay, foreach=fused)

    def update(self, steps: int) -> None:
        """Called after each optimizer step, with the number of those done."""
        for _ in range(self.repeats if (steps + 1) % self.interval == 0 else 0):
            self._model.optimization_step = steps  # the decay's n counts optimizer steps, not updates
            self._model.step(self.parameters)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """The student's tensors hold the averages inside the block, and their own values again after it."""
        self._model.store(self.parameters)
        self._model.copy_to(self.parameters)
        try:
            yield
        finally:
            self._model.restore(self.parameters)

    @property
    def shadow(self) -> list[Tensor]:
        """The averages, in the order of the parameters."""
        return self._model.shadow_params

    def load(self, shadow: Sequence[Tensor]) -> None:
        """Restore saved averages."""
        for mine, saved in zip(self.shadow, shadow, strict=True):
            mine.copy_(saved)


def _adamw_class(use_8bit: bool) -> type[torch.optim.AdamW]:
    if not use_8bit:
        return torch.optim.AdamW
    try:
        import bitsandbytes
    except ImportError as error:
        raise ImportError("train.use_8bit_adam needs bitsandbytes: pip install bitsandbytes") from error
    return bitsandbytes.optim.AdamW8bit
