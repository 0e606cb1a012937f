"""Write the page and the numbers of a distillation: `report.html` and `summary.json`.

    python -m tools.quickstart_report --run logs/a/run --eval logs/a/evaluation --output logs/a

The evaluations are those of `scripts/evaluate.py`, in `<eval>/{base,teacher-<task>,student}/<task>/`.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from anywhere

from diffusionopd.files import write_atomically
from tools.report import collect, render, summary, text_table


def main() -> None:
    """Flags to files; prints the table and where the page is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="run folder, with config.json and metrics.jsonl")
    parser.add_argument("--eval", type=Path, required=True, help="folder of the evaluations")
    parser.add_argument("--output", type=Path, required=True, help="folder for report.html and summary.json")
    parser.add_argument("--title", default="DiffusionOPD: several teachers in one student")
    parser.add_argument("--seconds", type=float, default=0.0, help="wall-clock time of the distillation")
    flags = parser.parse_args()
    try:
        report = collect(flags.run, flags.eval, flags.title, flags.seconds)
        page = render(report)
    except (ValueError, OSError) as error:  # OSError: an image that is none
        sys.exit(f"error: {error}")
    flags.output.mkdir(parents=True, exist_ok=True)
    write_atomically(flags.output / "report.html", page)
    write_atomically(flags.output / "summary.json", json.dumps(summary(report), indent=2) + "\n")
    print(
        f"\n{text_table(report)}\n\nsummary: {flags.output / 'summary.json'}\nreport:  {flags.output / 'report.html'}"
    )


if __name__ == "__main__":
    main()
