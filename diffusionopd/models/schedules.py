"""Noise levels of a pipeline's own scheduler: of flow matching, whatever the class, or refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

_REMEDY = "Save the pipeline with FlowMatchEulerDiscreteScheduler; its shift is what others call flow_shift"


def is_of_flow_matching(kind: str, config: Mapping[str, Any]) -> bool:
    """Whether a scheduler of the class ``kind`` is one of flow matching by its configuration."""
    flows = config.get("use_flow_sigmas") and config.get("prediction_type") == "flow_prediction"
    return kind.startswith("FlowMatch") or bool(flows)


FAMILY, LINSPACE = SCHEDULES = "family", "linspace"
"""What the levels are before their shift: the scheduler's own, or evenly spread from 1 to 1 / num_steps."""


def flow_levels(
    scheduler: Any, num_steps: int, mu: float | None = None, schedule: str | Sequence[float] = FAMILY
) -> Tensor:
    """``num_steps + 1`` levels, decreasing to 0, float64 on the CPU; ``mu`` is the shift where it is dynamic.

    Schedulers of flow matching give the levels of Euler steps, solvers with ``use_flow_sigmas`` (UniPC, DPM++) their
    own. Those of ``linspace``, and given ones, ``num_steps`` of them, are shifted as
    ``FlowMatchEulerDiscreteScheduler.set_timesteps(sigmas=...)`` does it, by the scheduler's shift, whatever its class.
    ValueError for a scheduler without such levels, and for one that has ``shift`` and ``flow_shift`` and follows the
    wrong one.
    """
    config, name = scheduler.config, type(scheduler).__name__
    matching = name.startswith("FlowMatch")
    if not is_of_flow_matching(name, config):
        raise ValueError(f"its scheduler {name} does not say that it is one of flow matching. {_REMEDY}")
    own, other = ("shift", "flow_shift") if matching else ("flow_shift", "shift")
    if config.get("use_dynamic_shifting") is not True and config.get(other, config[own]) != config[own]:
        raise ValueError(
            f"its scheduler {name} follows {own} {config[own]:g}, but its scheduler_config.json says "
            f"{other} {config[other]:g}, too. Delete the one that is not meant, or set both to one value."
        )
    shift = {} if mu is None else {"mu": mu}
    if schedule != FAMILY:
        given = np.linspace(1.0, 1 / num_steps, num_steps).tolist() if schedule == LINSPACE else schedule
        made = FlowMatchEulerDiscreteScheduler.from_config(config, shift=config[own])
        made.set_timesteps(sigmas=given, **shift)
    else:
        made = (FlowMatchEulerDiscreteScheduler if matching else type(scheduler)).from_config(config)
        made.set_timesteps(num_steps, **shift)
    levels = made.sigmas.double().cpu()
    values = levels.tolist()
    if len(values) != num_steps + 1 or values[-1] != 0 or values[0] > 1 or any(b >= a for a, b in pairwise(values)):
        set_ones = (key for key in sorted(config) if key.endswith(("_sigmas", "_sigmas_type")) and config[key])
        options = ", ".join(f"{key} {config[key]}" for key in set_ones)
        raise ValueError(f"the noise levels of its scheduler {name} do not fall from 1 to 0 ({options}). {_REMEDY}")
    return levels
