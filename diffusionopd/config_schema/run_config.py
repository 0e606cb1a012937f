"""The ``config.json`` of a run: data from elsewhere, unlike a configuration file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusionopd.config_schema.problems import ConfigError, Problems
from diffusionopd.config_schema.sources import check_tasks
from diffusionopd.config_schema.values import SECTIONS, base_config, check_values, flatten


def read_run_config(path: Path) -> dict[str, Any]:
    """The configuration in a run's ``config.json`` as nested dicts.

    Keys that this version knows are checked by type and range, others are kept as they are, and what is missing stays
    missing: another version or the upstream release may have written it. Raises ConfigError naming the file.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise TypeError(f"it holds a {type(config).__name__}")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError([f"{path} is not the config.json of a run: {error}"]) from None
    problems = Problems()
    for section in SECTIONS:
        if not isinstance(config.get(section, {}), Mapping):
            problems.add(section, f"is {config[section]!r}", "It must be an object.")
    defaults, values = flatten(base_config()), flatten(config)
    if not problems.found:
        check_values({key: value for key, value in values.items() if key in defaults}, defaults, problems)
    if problems.good("train.teachers"):
        check_tasks(values.get("train.teachers", []), problems)
    if problems.found:
        raise ConfigError(f"{path}: {problem}" for problem in problems.found)
    return config
