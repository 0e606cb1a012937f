"""Check a command line before processes are started: ``python -m diffusionopd.config_schema --num_processes N ...``.

Takes the arguments of ``scripts/train_opd.py`` and ``train_teacher.py``. Silent when all is well; otherwise prints the
problems, once and without a stack trace, and exits with status 2. It needs neither torch nor a GPU and takes a second.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from diffusionopd.config_schema import (
    ConfigError,
    ResumeError,
    check,
    load_config,
    redacted,
    resumed,
    split_arguments,
)


def main(arguments: Sequence[str]) -> int:
    """Return the exit status."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--num_processes", type=int, required=True)
    try:
        source, overrides, rest = split_arguments(arguments)
        num_processes = parser.parse_known_args(rest)[0].num_processes
        if source is not None and not {"-h", "--help"} & set(rest):
            start = resumed(load_config(source, overrides), num_processes, "--allow_config_change" in rest)
            check(start.config, num_processes)
    except (ConfigError, ResumeError) as error:
        print(f"error: {redacted(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
