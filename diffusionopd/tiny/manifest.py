"""sha256 and size of every shipped file, so that what is shipped can be told from what was built by someone else."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

NAME = "manifest.json"


def describe(folder: Path) -> dict[str, dict[str, Any]]:
    """Path below `folder` -> {"bytes", "sha256"} of every file but the manifest itself."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / NAME)
    return {
        p.relative_to(folder).as_posix(): {
            "bytes": p.stat().st_size,
            "sha256": hashlib.sha256(p.read_bytes()).hexdigest(),
        }
        for p in paths
    }


def write(folder: Path) -> None:
    """Describes what is in `folder` in its manifest."""
    (folder / NAME).write_text(json.dumps({"files": describe(folder)}, indent=1) + "\n")


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """What `describe` said when the manifest was written."""
    return json.loads((folder / NAME).read_text())["files"]
