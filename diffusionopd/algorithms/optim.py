"""The optimizer step of a round, or of several: scaled backward, one all-reduce, clipping, AdamW, EMA."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from diffusionopd.config_schema import FREE, key
from diffusionopd.distributed import average_gradients
from diffusionopd.stages import stage


class NonFiniteError(ValueError):
    """A velocity, loss or gradient is NaN or infinite; the student has not been touched by it."""


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW."""

    learning_rate: float = key("train.learning_rate", 3e-4, "(0, inf)", resume=FREE)
    """Of AdamW."""
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


@dataclass(frozen=True)
class EmaSettings:
    """The average of the student."""

    ema: bool = key("train.ema", False, resume=FREE)
    """Average the student's weights over rounds; evaluation and the saved LoRA use the average."""
    ema_decay: float = key("train.ema_decay", 0.9, "[0, 1)", resume=FREE)
    """The average keeps min((1 + n) / (10 + n), ema_decay) of itself, every `ema_interval` rounds (rounds that share an
    optimizer step count as one)."""
    ema_interval: int = key("train.ema_interval", 8, "[1, inf)", resume=FREE)
    """See `train.ema_decay`."""


class StudentOptimizer:
    """AdamW with a constant loss scale, dynamic scaling for fp16 and gradient clipping over the student's tensors.

    ``loss_scale`` multiplies every loss before backward. A mean over latent dimensions, steps and samples leaves
    gradients so small that AdamW's epsilon would swallow them (``docs/method.md`` has the figures); apart from epsilon
    AdamW does not see the factor. Whatever this class reports, and the clipping threshold, are in the units of the
    unscaled loss.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], settings: OptimizerSettings, dynamic_scale: bool = False
    ) -> None:
        self.parameters = list(parameters)
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
        """The learning rate of the next step."""
        return self._adamw.param_groups[0]["lr"]

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
        skipped, the scale halves, and None is returned; it raises once the scale is below 1, where the gradient itself
        must be broken.
        """
        with stage("optimizer step"):
            return self._step()

    def _step(self) -> float | None:
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
        """The dynamic scale's state, if there is one, and what kept gradients are multiples of."""
        scalars = dict(self._scaler.state_dict())
        return scalars | {"kept": self._kept, "gradient_scale": self._scale()} if self._kept else scalars

    def _scale(self) -> float:
        return self.loss_scale * self._scaler.get_scale()

    def load_state(self, tensors: dict[str, Tensor], scalars: dict[str, float]) -> None:
        """Restore what the two methods above returned; the learning rate stays the configured one."""
        state: dict[int, dict[str, Tensor]] = {}
        for place, value in tensors.items():
            _, index, name = place.split(".", 2)
            state.setdefault(int(index), {})[name] = value
        gradients = {i: own.pop(_GRADIENT) for i, own in state.items() if _GRADIENT in own}
        groups = self._adamw.state_dict()["param_groups"]
        self._adamw.load_state_dict({"state": {i: own for i, own in state.items() if own}, "param_groups": groups})
        if "scale" in scalars and self._scaler.is_enabled():
            self._scaler.load_state_dict(scalars)
        self._kept = int(scalars.get("kept", 0))
        for i, gradient in gradients.items():
            parameter = self.parameters[i]
            # The saved scale is another one after a change of train.loss_scale.
            parameter.grad = (gradient * (self._scale() / scalars["gradient_scale"])).to(parameter.device)


_GRADIENT = "gradient"  # among AdamW's own names


class Ema:
    """Exponential moving average of the student, updated every ``interval`` rounds (diffusers' EMAModel does the work).

    Decay after n rounds: ``min((1 + n) / (10 + n), decay)``. Several rounds that make one optimizer step count as one.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float, interval: int, fused: bool = False) -> None:
        """``fused`` updates all tensors in a few kernels: the same to rounding."""
        self.parameters = list(parameters)
        self.interval = interval
        self._model = EMAModel(self.parameters, decay=decay, foreach=fused)

    def update(self, completed_rounds: int) -> None:
        """Called after each round; acts on every ``interval``-th."""
        if completed_rounds % self.interval == 0:
            self._model.optimization_step = completed_rounds  # the decay's n counts rounds, not updates
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
