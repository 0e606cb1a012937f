"""The command ``diffusionopd``: one name for the project's scripts, ``diffusionopd evaluate ...`` for evaluate.py."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from diffusionopd.files import PROJECT

COMMANDS = {
    "train": ("scripts/train_opd.py", "distil the teachers of a configuration into one student"),
    "merge": ("scripts/merge.py", "merge the LoRAs of a table into one, and show how well"),
    "merged": ("tools/merged.py", "the page of such a merge again"),
    "teacher": ("scripts/train_teacher.py", "train a teacher LoRA from rewards"),
    "evaluate": ("scripts/evaluate.py", "generate the images of test sets and score them"),
    "compare": ("tools/compare.py", "put evaluated models into one table, with their images side by side"),
    "gallery": ("tools/gallery.py", "draw base, teachers and student on prompts of your own"),
    "publish": ("tools/publish.py", "publish a student on the Hugging Face hub, with a card"),
    "cost": ("tools/cost.py", "count what a round of a configuration costs, without weights"),
    "download": ("tools/download.py", "download prompt sets, scorer weights and models"),
}
"""Name -> script, from the project's folder, and what it does."""

_SEVERAL = """In several processes, one per GPU: the launchers (scripts/single_node/mopd.sh, teacher.sh, eval.sh),
or accelerate launch -m diffusionopd train ..."""


def usage() -> str:
    """The list of commands."""
    rows = "\n".join(f"  {name:<10} {what}" for name, (_, what) in COMMANDS.items())
    return f"usage: diffusionopd COMMAND [arguments]; COMMAND --help has them\n\n{rows}\n\n{_SEVERAL}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Become the script of a command: same process, environment, signals and exit status."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("--help", "-h"):
        print(usage())
        return
    if name not in COMMANDS:
        sys.exit(f"error: there is no command {name!r}\n\n{usage()}")
    if PROJECT is None:
        sys.exit(
            "error: diffusionopd is installed without its scripts, tools and configurations, which are in its "
            "repository: clone that and install it with pip install -e ."
        )
    # The script's library is the one beside it, whatever else is installed.
    paths = [str(PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, str(PROJECT / COMMANDS[name][0]), *rest]
    # transformers would warn that it works without torchvision, which is meant here.
    quiet = {"TRANSFORMERS_VERBOSITY": "error"}
    os.execve(sys.executable, command, quiet | os.environ | {"PYTHONPATH": os.pathsep.join(paths)})


if __name__ == "__main__":
    main()
