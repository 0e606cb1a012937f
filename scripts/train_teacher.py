"""Train one teacher from rewards (DiffusionNFT, Flow-GRPO or GRPO-Guard).

    python scripts/train_teacher.py --config config/teacher.py:tiny_scene [--config.num_epochs=20 ...] [--dry_run]

Several processes: `CONFIG=... bash scripts/single_node/teacher.sh`. Flags as of train_opd.py; what comes out,
`<run folder>/checkpoints/checkpoint-<n>/lora`, is a teacher for `train.teachers`.
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
