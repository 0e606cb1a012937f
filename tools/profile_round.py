"""Profile the rounds of a configuration: where the time goes, as a table, a bar chart and a trace.

    python -m tools.profile_round --config config/tiny.py:mopd
    accelerate launch -m tools.profile_round --config config/opd.py:mopd --rounds 5 --output logs/profile/mopd

--config FILE:NAME       the configuration, of any training script; --config.KEY=VALUE sets a key of it
--rounds N               rounds to time each way (default 3), after a warm-up
--output FOLDER          default logs/profile/<run name>; gets summary.txt, summary.json, stages.svg, and
                         trace.json.gz for https://ui.perfetto.dev or chrome://tracing
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from anywhere

from diffusionopd.config_schema import split_arguments
from diffusionopd.files import path_flag
from diffusionopd.training import load_config
from diffusionopd.training.profiling import profile
from tools.report.plots import shares


def main() -> str | None:
    """Flags to files; the message of a mistake."""
    try:
        source, overrides, rest = split_arguments(sys.argv[1:])
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--rounds", type=int, default=3)
        parser.add_argument("--output", type=path_flag)
        flags = parser.parse_args(rest)
        if source is None or flags.rounds < 1:
            return "error: --config FILE:NAME is missing, or --rounds is below 1; --help has examples"
        config = load_config(source, overrides)
        folder = flags.output or Path("logs") / "profile" / (config.run_name or "run")
        found = profile(config, folder, flags.rounds)
    except ValueError as error:
        return f"error: {error}"
    if found is not None:
        (folder / "stages.svg").write_text(shares(found["stage_seconds"], "seconds of a round"), encoding="utf-8")
        print(f"\n{(folder / 'summary.txt').read_text()}")
        print(f"written to {folder.absolute()}: summary.txt, summary.json, stages.svg, trace.json.gz")
    return None


if __name__ == "__main__":
    sys.exit(main())
