"""Distil the teachers of a configuration into one student.

    accelerate launch scripts/train_opd.py --config config/opd.py:mopd --config.train.learning_rate=1e-4

--config FILE:NAME       the configuration (default config/opd.py:mopd)
--config.KEY=VALUE       any key of it, such as --config.train.teachers[0].guidance_scale=1.0
--dry_run                check everything that can be checked before weights load, print the derived counts, and stop
"""

import sys

from diffusionopd.config_schema import load_config, split_arguments
from diffusionopd.trainer import train


def main(arguments: list[str]) -> str | None:
    """Run; returns an error message for the exit status, or None."""
    if "--help" in arguments or "-h" in arguments:
        print(__doc__)
        return None
    try:
        source, overrides, rest = split_arguments(arguments)
        dry_run = "--dry_run" in rest
        if unknown := [argument for argument in rest if argument != "--dry_run"]:
            return f"error: unknown arguments {' '.join(unknown)}; keys are set as --config.<key>=<value>"
        train(load_config(source or "config/opd.py:mopd", overrides), dry_run=dry_run)
    except ValueError as error:
        return f"error: {error}"
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
