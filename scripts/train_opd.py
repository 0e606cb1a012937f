"""Distil the teachers of a configuration into one student.

    accelerate launch scripts/train_opd.py --config config/opd.py:mopd --config.train.learning_rate=1e-4

--config FILE:NAME       the configuration (default config/opd.py:mopd)
--config.KEY=VALUE       any key of it, such as --config.train.teachers[0].guidance_scale=1.0
--dry_run                check everything that can be checked before weights load, print the derived counts, and stop
--allow_config_change    resume although the configuration describes another experiment than the checkpoint's
"""

import sys

from diffusionopd.training import run_command

if __name__ == "__main__":
    sys.exit(run_command(sys.argv[1:], "config/opd.py:mopd", __doc__))
