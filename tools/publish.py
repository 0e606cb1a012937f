"""Publish a trained student on the Hugging Face hub, with a card made of what its run and evaluations hold.

    python -m tools.publish logs/mopd owner/name --dry_run            # what would be published; writes nothing
    python -m tools.publish logs/mopd owner/name --folder out         # into a folder, to read it first
    python -m tools.publish logs/mopd owner/name --license mit --private

A RUN is a run folder (its newest checkpoint) or a checkpoint. Published are the LoRA as a diffusers file and as a PEFT
folder, README.md, config.json and metrics.jsonl without secrets and local paths, and the newest grid of samples.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from anywhere

from diffusionopd.config_schema import redacted
from diffusionopd.files import path_flag, write_atomically, writing
from tools.publishing.card import render_card
from tools.publishing.content import PublishError, find_student, publication
from tools.publishing.scores import read_scores
from tools.publishing.upload import check_name, check_token, upload
from tools.report.evaluated import EVALUATION


def main(arguments: list[str] | None = None) -> None:
    """Flags to files; a mistake of the user's ends in one line, not in a traceback."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="run folder, or <run>/checkpoints/checkpoint-<n>")
    parser.add_argument("repo", metavar="OWNER/NAME", help="repository on the hub, made if it is not there")
    parser.add_argument("--dry_run", action="store_true", help="list what would be published, and write nothing")
    parser.add_argument("--folder", type=path_flag, metavar="OUT", help="write into this folder instead of uploading")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--overwrite", action="store_true", help="replace files of the same names that are there")
    parser.add_argument("--license", help="for the card, as the hub names it: mit, apache-2.0, other, ...")
    parser.add_argument("--base_model", metavar="OWNER/NAME", help="the base on the hub, where the run names a folder")
    where = "folder of the evaluations whose scores go into the card (default <run>/evaluation)"
    parser.add_argument("--evaluation", type=path_flag, help=where)
    flags = parser.parse_args(arguments)
    try:
        _publish(flags)
    except (ValueError, OSError) as error:
        sys.exit(redacted(f"error: {error}"))


def _publish(flags: argparse.Namespace) -> None:
    for name in filter(None, (flags.repo, flags.base_model)):
        check_name(name)
    if flags.folder:
        _refuse_taken(flags.folder, flags.overwrite)
    student = find_student(flags.run, flags.base_model)
    if not flags.folder and not flags.dry_run:
        check_token()
    evaluations = flags.evaluation or student.run / EVALUATION
    if flags.evaluation and not flags.evaluation.is_dir():
        raise PublishError(f"there is no folder {flags.evaluation}: name one with evaluations of scripts/evaluate.py")
    scores, warnings, left_out = read_scores(student, evaluations)
    files = publication(student, render_card(student, flags.repo, flags.license, scores, warnings))
    print(f"{student.folder}, {student.rounds} rounds, as {flags.repo}:")
    print("\n".join(f"  {len(content):>12,} bytes  {name}" for name, content in files.items()))
    for note in _notes(flags, student.base_model, bool(scores), left_out):
        print(f"note: {note}")
    if flags.dry_run:
        print("dry run: nothing was written or uploaded")
    elif flags.folder:
        for name, content in files.items():
            with writing(flags.folder / name, "file", "Choose another --folder, or free space."):
                write_atomically(flags.folder / name, content)
        print(f"written to {flags.folder.absolute()}")
    else:
        print(f"published: {upload(flags.repo, files, private=flags.private, overwrite=flags.overwrite)}")


def _notes(flags: argparse.Namespace, base_model: str | None, has_scores: bool, left_out: list[str]) -> list[str]:
    """What the card lacks, and how it would come."""
    notes = [f"no scores of {text}" for text in left_out]
    if not has_scores:
        notes.append("the card has no scores: scripts/evaluate.py with --output_dir <run>/evaluation makes them")
    if base_model is None:
        notes.append("the base model is known as a local folder only: name it with --base_model owner/name")
    if flags.license is None:
        notes.append("the card names no licence: choose one with --license; those of base and teachers may bind you")
    return notes


def _refuse_taken(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise PublishError(f"{folder} is a file: name another --folder")
    if folder.is_dir() and (there := sorted(path.name for path in folder.iterdir())) and not overwrite:
        raise PublishError(f"{folder} is not empty ({', '.join(there[:6])}): name another, or add --overwrite")


if __name__ == "__main__":
    main()
