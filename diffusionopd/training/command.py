"""The command line of the training scripts."""

from __future__ import annotations

from collections.abc import Sequence

from diffusionopd.config_schema import load_config, redacted, split_arguments
from diffusionopd.signals import STOPPED
from diffusionopd.training.loop import train
from diffusionopd.training.stop import Stopped


def run_command(arguments: Sequence[str], default: str | None, usage: str | None) -> str | int | None:
    """Train as the command line says.

    ``--config FILE:NAME`` (else ``default``), ``--config.KEY=VALUE``, ``--dry_run``, ``--allow_config_change``,
    ``--help`` (prints ``usage``).
    Returns what ``sys.exit`` takes: an error message, STOPPED when a signal ended the run early, or None.
    """
    if "--help" in arguments or "-h" in arguments:
        print(usage)
        return None
    try:
        source, overrides, rest = split_arguments(arguments)
        if unknown := [argument for argument in rest if argument not in ("--dry_run", "--allow_config_change")]:
            return redacted(f"error: unknown arguments {' '.join(unknown)}; keys are set as --config.<key>=<value>")
        source = source or default
        if source is None:
            return "error: --config FILE:NAME is missing; --help has examples"
        allow = "--allow_config_change" in rest
        train(load_config(source, overrides), dry_run="--dry_run" in rest, allow_config_change=allow)
    except Stopped:
        return STOPPED
    except ValueError as error:
        return f"error: {redacted(error)}"
    return None
