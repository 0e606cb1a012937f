"""Scripts in several gloo processes without a launcher, so that each one's end can be looked at by itself."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .conftest import ROOT


@dataclass(frozen=True)
class Ended:
    """How one process ended."""

    status: int
    out: str
    errors: str


def run_ranks(script: Path, world: int = 2, environment: Mapping[str, str] | None = None) -> list[Ended]:
    """Run ``script`` in ``world`` processes that find each other; how each ended, by rank.

    A process that still runs after two minutes fails the test.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    common |= {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **(environment or {})}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script)],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        ends = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [Ended(p.returncode, out, errors) for p, (out, errors) in zip(processes, ends, strict=True)]
