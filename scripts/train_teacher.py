"""Train a teacher LoRA from rewards: DiffusionNFT, Flow-GRPO or GRPO-Guard, as the configuration says.

    accelerate launch scripts/train_teacher.py --config config/teacher.py:nft_geneval

--config FILE:NAME       the configuration
--config.KEY=VALUE       any key of it, such as --config.train.learning_rate=1e-4
--dry_run                check everything that can be checked before weights load, print the derived counts, and stop
--allow_config_change    resume although the configuration describes another experiment than the checkpoint's

The result, <run folder>/checkpoints/checkpoint-<n>/lora, is what train.teachers takes as lora_path.
"""

import sys

from diffusionopd.training import run_command

if __name__ == "__main__":
    sys.exit(run_command(sys.argv[1:], None, __doc__))
