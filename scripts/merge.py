"""Merge LoRAs of one base model into one: a student learns what each of them draws, and a page shows how well.

    diffusionopd merge my_loras.csv

The table (CSV) has a row for each LoRA: name and lora and, where wanted, scale, trigger, prompts and guidance_scale
(docs/merging.md). After training, <run folder>/merged.html shows each LoRA, their plain sum and the student.

--config FILE:NAME       the configuration (default config/merge.py: Stable Diffusion 3.5 Medium)
--config.KEY=VALUE       any key of it, such as --config.run_name=animals
--dry_run                check everything that can be checked before weights load, print the derived counts, and stop
--allow_config_change    resume although the configuration describes another experiment than the checkpoint's
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from anywhere

from diffusionopd.training import train
from diffusionopd.training.command import parse, plain_errors
from tools import merged


def main() -> None:
    """Train as the command line says, and write the page."""
    arguments = sys.argv[1:]
    if arguments and not arguments[0].startswith("-"):
        arguments[0] = f"--config.loras={arguments[0]}"
    with plain_errors():
        saved = train(**parse(arguments, usage=__doc__, default="config/merge.py"))
        if saved and os.environ.get("RANK", "0") == "0":
            merged.write(saved.parent.parent)


if __name__ == "__main__":
    main()
