"""The command line of the training scripts."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusionopd.config_schema import ConfigError, redacted, split_arguments
from diffusionopd.locks import HeldError
from diffusionopd.signals import STOPPED
from diffusionopd.training.keys import load_config
from diffusionopd.training.resume import RunError
from diffusionopd.training.stop import Stopped

FLAGS = ("--dry_run", "--allow_config_change")


def parse(arguments: Sequence[str], usage: str, default: str | None = None) -> dict[str, Any]:
    """What :func:`diffusionopd.training.train` is called with.

    ``--config FILE:NAME`` (else ``default``), ``--config.KEY=VALUE``, ``--dry_run``, ``--allow_config_change``,
    ``--help`` (prints ``usage`` and exits). Raises ConfigError for anything else.
    """
    if {"--help", "-h"} & set(arguments):
        print(usage)
        raise SystemExit
    source, overrides, rest = split_arguments(arguments)
    if unknown := [argument for argument in rest if argument not in FLAGS]:
        raise ConfigError([f"unknown arguments {' '.join(unknown)}; keys are set as --config.<key>=<value>"])
    source = source or default
    if source is None:
        raise ConfigError(["--config FILE:NAME is missing; --help has examples"])
    return {"config": load_config(source, overrides), **{flag.removeprefix("--"): flag in rest for flag in FLAGS}}


@contextmanager
def plain_warnings() -> Iterator[None]:
    """The project's own warnings are one line each inside the block, without the place in the code."""
    before, package = warnings.formatwarning, str(Path(__file__).parent.parent)

    def formatted(message: Any, category: Any, filename: str, *place: Any, **options: Any) -> str:
        own = filename.startswith(package)
        return f"note: {message}\n" if own else before(message, category, filename, *place, **options)

    warnings.formatwarning = formatted
    try:
        yield
    finally:
        warnings.formatwarning = before


@contextmanager
def plain_errors() -> Iterator[None]:
    """A mistake of the user's ends the program with one message of the first process and no traceback.

    The status is 2 for arguments or a configuration that cannot be run, 1 for what fails later, and STOPPED for a run
    that a signal ended early.
    """
    try:
        with plain_warnings():
            yield
    except Stopped:
        raise SystemExit(STOPPED) from None
    except ValueError as error:
        if os.environ.get("RANK", "0") == "0":
            message = "\n".join([str(error), *getattr(error, "__notes__", [])])
            print(redacted(f"error: {message}"), file=sys.stderr)
        raise SystemExit(2 if isinstance(error, ConfigError | HeldError | RunError) else 1) from None
