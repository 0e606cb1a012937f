"""Distil the teachers of a configuration into one student.

    accelerate launch scripts/train_opd.py --config config/opd.py:mopd --config.train.learning_rate=1e-4

--config FILE:NAME       the configuration (default config/opd.py:mopd)
--config.KEY=VALUE       any key of it, such as --config.train.teachers[0].guidance_scale=1.0
--dry_run                check everything that can be checked before weights load, print the derived counts, and stop
--allow_config_change    resume although the configuration describes another experiment than the checkpoint's
"""

import sys

from diffusionopd.training import train
from diffusionopd.training.command import parse, plain_errors


def main() -> None:
    """Train as the command line says."""
    with plain_errors():
        train(**parse(sys.argv[1:], usage=__doc__, default="config/opd.py:mopd"))


if __name__ == "__main__":
    main()
