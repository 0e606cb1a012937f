"""Distil teachers into one student.

    python scripts/train_opd.py --config config/opd.py:mopd [--config.train.learning_rate=1e-4 ...] [--dry_run]

Several processes: `bash scripts/single_node/mopd.sh`, or `accelerate launch scripts/train_opd.py ...`. Resume with the
same command and `--config.resume_from=auto`; `--allow_config_change` goes on with another experiment's settings.
Every key is explained in docs/configuration.md.
"""

import sys

from diffusionopd.training import train
from diffusionopd.training.command import parse, plain_errors


def main() -> None:
    """Train as the command line says."""
    with plain_errors():
        train(**parse(sys.argv[1:], usage=__doc__))


if __name__ == "__main__":
    main()
