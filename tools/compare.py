"""Put several evaluated models into one table, the paper's, with their images side by side.

    python -m tools.compare logs/base/evaluation student=logs/mopd --published
    python -m tools.compare logs/quickstart/evaluation/*

A RUN is what `scripts/evaluate.py` wrote: the folder of one evaluation, a folder with one for each data set, or a run
folder with either in its evaluation/. Prints the table; writes comparison.html, comparison.csv and comparison.txt.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from anywhere

from diffusionopd.files import path_flag, write_atomically
from diffusionopd.training.command import plain_warnings
from tools.report import compare, csv_table, published_models, read_models, render_comparison, text_comparison


def main(arguments: list[str] | None = None) -> None:
    """Flags to files; a mistake of the user's ends in one line, not in a traceback."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="[NAME=]RUN", help="a model's evaluations; NAME for the table")
    parser.add_argument(
        "--output", type=path_flag, default=Path("logs/comparison"), help="folder (default logs/comparison)"
    )
    parser.add_argument("--published", action="store_true", help="add the rows of the paper's Table 1")
    shown = "prompts to show of each data set, the first ones"
    parser.add_argument("--pictures", type=int, default=12, metavar="PROMPTS", help=shown)
    parser.add_argument("--title", default="DiffusionOPD: models compared")
    flags = parser.parse_args(arguments)
    try:
        with plain_warnings():
            models = read_models(flags.runs)
        comparison = compare([*published_models(), *models] if flags.published else models)
        page = render_comparison(comparison, flags.title, flags.pictures)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    text = text_comparison(comparison)
    for name, content in (("html", page), ("csv", csv_table(comparison)), ("txt", text + "\n")):
        write_atomically(flags.output / f"comparison.{name}", content)
    print(f"\n{text}\n\nwritten to {flags.output.absolute()}: comparison.html, comparison.csv, comparison.txt")


if __name__ == "__main__":
    main()
