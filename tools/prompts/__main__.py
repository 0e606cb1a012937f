"""Generate training prompts.

    python -m tools.prompts geneval --output dataset/geneval/train_metadata.jsonl --count 50000 --repeat \\
        --exclude dataset/geneval/test_metadata.jsonl
    python -m tools.prompts ocr --output dataset/ocr/train.txt --count 20000 --exclude dataset/ocr/test.txt
"""

import argparse
import sys

from diffusionopd.data.prompts import PromptError, read_prompts
from diffusionopd.files import path_flag, write_atomically
from tools.prompts import geneval, ocr


def main(arguments: list[str] | None = None) -> None:
    """Flags to file; a mistake of the user's ends in one line, not in a traceback."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.prompts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind, what in (("geneval", "GenEval's grammar"), ("ocr", "scenes with text in double quotes")):
        own = kinds.add_parser(kind, help=what)
        own.add_argument("--output", type=path_flag, required=True, help="file to write")
        own.add_argument("--count", type=int, required=True, help="prompts")
        own.add_argument("--seed", type=int, default=42)
        own.add_argument("--exclude", type=path_flag, help="file of the same format whose prompts must not occur")
        own.add_argument("--force", action="store_true", help="replace the file")
    repeat = "hold Flow-GRPO's shares of the tags by repeating prompts of small tags"
    kinds.choices["geneval"].add_argument("--repeat", action="store_true", help=repeat)
    flags = parser.parse_args(arguments)
    try:
        if flags.output.exists() and not flags.force:
            raise PromptError(f"{flags.output} exists already; choose another --output, or replace it with --force")
        prompt_fn = "geneval" if flags.kind == "geneval" else "general_ocr"
        exclude = [prompt.text for prompt in read_prompts(flags.exclude, prompt_fn)] if flags.exclude else []
        if flags.kind == "geneval":
            lines = geneval.generate(flags.count, flags.seed, exclude, flags.repeat)
        else:
            lines = ocr.generate(flags.count, flags.seed, exclude)
        write_atomically(flags.output, "".join(f"{line}\n" for line in lines), fsync=True)
    except PromptError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {flags.output} cannot be written: {error.strerror}")
    print(f"{flags.output}: {flags.count} lines, {len(set(lines))} different prompts")


if __name__ == "__main__":
    main()
