"""Train a teacher LoRA from rewards: DiffusionNFT, Flow-GRPO or GRPO-Guard, as the configuration says.

    accelerate launch scripts/train_teacher.py --config config/teacher.py:nft_geneval

Flags are those of train_opd.py; there is no default configuration. The result,
<run folder>/checkpoints/checkpoint-<n>/lora, is what train.teachers takes as lora_path.
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
