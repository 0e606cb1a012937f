"""What can be done with a configuration before a weight is loaded: read it, check it, count what it asks for.

``config/base.py`` has the keys, their defaults and what they do. ``load_config`` reads a file and merges it with these
defaults, ``check`` reports every problem at once and returns the ``RunPlan``.
"""

from __future__ import annotations

from collections.abc import Collection

from ml_collections import ConfigDict

from diffusionopd.config_schema.load import load_config, split_arguments
from diffusionopd.config_schema.plan import RunPlan, check_batches, check_patience, check_sampler, make_plan, notes
from diffusionopd.config_schema.problems import ConfigError, Problems
from diffusionopd.config_schema.resume import (
    ResumeError,
    SavedRun,
    Start,
    changes_since,
    read_saved,
    refuse_changes,
    resumed,
)
from diffusionopd.config_schema.run_config import read_run_config
from diffusionopd.config_schema.secrets import check_no_secrets, find_secrets, redacted
from diffusionopd.config_schema.sources import (
    TeacherSpec,
    check_folders,
    check_model,
    check_packages,
    check_teachers,
)
from diffusionopd.config_schema.values import base_config, check_names, check_values, flatten, to_plain

__all__ = [
    "ConfigError",
    "ResumeError",
    "RunPlan",
    "SavedRun",
    "Start",
    "TeacherSpec",
    "base_config",
    "changes_since",
    "check",
    "find_secrets",
    "load_config",
    "read_run_config",
    "read_saved",
    "redacted",
    "refuse_changes",
    "resumed",
    "split_arguments",
]


def check(
    config: ConfigDict, num_processes: int, reward_names: Collection[str] | None = None, *, sources: bool = True
) -> RunPlan:
    """Check everything that can be checked without loading weights, and derive the counts of a round.

    ``config`` has the keys of ``config/base.py``; ``num_processes`` is the number of processes of the whole run;
    ``reward_names`` are the rewards that ``proxy_reward`` may name (None: not checked). Without ``sources`` the prompt
    files, teachers, model, folders and packages need not be there: for counting only, ``num_prompts`` may be 0.
    Relative paths are looked up from the current directory. Nothing is downloaded or written. Raises ConfigError with
    every problem found.
    """
    values, defaults = flatten(config), flatten(base_config())
    check_no_secrets(to_plain(config))  # alone: the other problems quote values
    problems = Problems(() if sources else (".dataset", ".lora_path"))
    check_names(values, defaults, problems)
    check_values(values, defaults, problems)
    if sources:
        check_model(values, problems)
        check_folders(values, problems)
        check_packages(values, problems)
    teachers, num_prompts = check_teachers(values, problems, reward_names)
    check_batches(values, num_processes, problems)
    check_sampler(values, problems)
    check_patience(values, num_processes, problems)
    if problems.found:
        raise ConfigError(problems.found)
    return make_plan(config, teachers, num_prompts, num_processes, notes=notes(values, defaults))
