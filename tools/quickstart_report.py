"""Write the page and the numbers of a distillation: `report.html` and `summary.json`.

    python -m tools.quickstart_report --run logs/a/run --eval logs/a/evaluation --output logs/a

The evaluations are those of `scripts/evaluate.py`, in `<eval>/{base,teacher-<task>,student}/<task>/`.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from anywhere

from diffusionopd.files import path_flag, write_atomically, write_json
from tools.report import collect, render, summary, text_table


def main() -> None:
    """Flags to files; prints the table and where the page is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=path_flag, required=True, help="run folder, with config.json and metrics.jsonl")
    parser.add_argument("--eval", type=path_flag, required=True, help="folder of the evaluations")
    parser.add_argument("--output", type=path_flag, required=True, help="folder for report.html and summary.json")
    parser.add_argument("--title", default="DiffusionOPD: several teachers in one student")
    parser.add_argument("--seconds", type=float, default=0.0, help="wall-clock time of the distillation")
    flags = parser.parse_args()
    try:
        report = collect(flags.run, flags.eval, flags.title, flags.seconds)
        page = render(report)
    except (ValueError, OSError) as error:  # OSError: an image that is none
        sys.exit(f"error: {error}")
    page_file = write_atomically(flags.output / "report.html", page)
    summary_file = write_json(flags.output / "summary.json", summary(report))
    print(f"\n{text_table(report)}\n\nsummary: {summary_file.absolute()}\nreport:  {page_file.absolute()}")


if __name__ == "__main__":
    main()
