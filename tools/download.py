"""Download prompt sets, scorer weights and models.

    python -m tools.download datasets                     # dataset/{geneval,ocr,pickscore,drawbench}
    python -m tools.download datasets geneval2 dpgbench   # what is loaded by name only: --list says which
    python -m tools.download rewards geneval hpsv2        # reward_ckpts/, and the hub models these scorers use
    python -m tools.download models sd3.5-medium loras    # into the Hugging Face cache
    python -m tools.download rewards --list

A download that was cut goes on where it stopped; a file that is there is verified and not loaded again. Stable
Diffusion 3.5 asks for its licence to be accepted on the hub, then for `hf auth login` or HF_TOKEN. Proxies are taken
from the usual environment variables, a mirror of the hub from HF_ENDPOINT, and one that takes GitHub's addresses
behind its own from DIFFUSIONOPD_MIRROR.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from anywhere

from diffusionopd.files import path_flag
from tools.downloads import CATALOGUE, DownloadError, choose, describe, download


def main(arguments: list[str] | None = None) -> int:
    """Flags to files; returns 1 if anything failed, after everything has been tried."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=CATALOGUE, help="what to download")
    parser.add_argument("names", nargs="*", help="which of the kind (default: all that --list does not mark)")
    parser.add_argument("--list", action="store_true", help="say what there is, from where, under which licence")
    parser.add_argument("--dry_run", action="store_true", help="say what would be loaded, and load nothing")
    parser.add_argument("--force", action="store_true", help="replace files that are there")
    where = "folder that dataset/ and reward_ckpts/ belong in (default: this repository)"
    parser.add_argument("--root", type=path_flag, default=Path(__file__).resolve().parent.parent, help=where)
    flags = parser.parse_args(arguments)
    try:
        items = choose(flags.kind, flags.names, everything=flags.list)
    except DownloadError as error:
        sys.exit(f"error: {error}")
    if flags.list or flags.dry_run:
        print("\n".join(describe(items, flags.root)))
        return 0
    failed = []
    for name, outcome, well in download(items, flags.root, flags.force):
        print(f"{name}: {outcome}" if well else f"{name}: FAILED", flush=True)
        if not well:
            failed.append(f"  {name}: {outcome}")
    if failed:
        print(f"\n{len(failed)} failed:", *failed, sep="\n", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
