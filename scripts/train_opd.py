"""Distil the teachers of a config into one student.

    accelerate launch scripts/train_opd.py --config config/opd.py:mopd --config.train.learning_rate=1e-4

Every key of the config can be overridden as ``--config.<key>=<value>``; ``--dry_run`` checks everything that can be checked
before weights load, prints the derived counts, and stops.
"""

import sys

from absl import app, flags

from diffusionopd.config_schema import define_config_flag
from diffusionopd.trainer import train

CONFIG = define_config_flag("config/opd.py:mopd")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Check the configuration, print the derived counts, and stop.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; config keys are set as --config.<key>=<value>")
    try:
        train(CONFIG.value, dry_run=DRY_RUN.value)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main)
