"""What a round costs, counted from architecture and configuration alone: evaluations, FLOPs, bytes. No model is built.

``read_pipeline`` gives the architecture of a base model, ``measure`` the cost of one transformer evaluation,
``count_round`` and ``memory`` those of a run. ``tools/cost.py`` prints them.
"""

from tools.costs.architecture import PUBLISHED, Pipeline, TransformerShape, read_pipeline
from tools.costs.evaluation import Cost, Lora, measure
from tools.costs.memory import Held, Memory, memory
from tools.costs.round import MACHINE, RoundCost, RunSettings, count_round

__all__ = [
    "MACHINE",
    "PUBLISHED",
    "Cost",
    "Held",
    "Lora",
    "Memory",
    "Pipeline",
    "RoundCost",
    "RunSettings",
    "TransformerShape",
    "count_round",
    "measure",
    "memory",
    "read_pipeline",
]
