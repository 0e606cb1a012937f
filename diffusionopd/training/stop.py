"""Ending a run early: a signal to one process stops all of them after the round."""

from __future__ import annotations

from pathlib import Path

from diffusionopd.distributed import any_process
from diffusionopd.signals import SignalWatch, name, say


class Stopped(Exception):
    """Raised by :func:`diffusionopd.training.train` when a signal ended a run early, saved, with more to do."""

    def __init__(self, checkpoint: Path | None) -> None:
        super().__init__(f"stopped early; saved {checkpoint}")
        self.checkpoint = checkpoint


class Stop(SignalWatch):
    """Within a ``with`` block: notes a signal, says so once, and lets the processes agree on ending."""

    def __init__(self, announce: bool) -> None:
        """``announce`` on one process: the others hear of it when they agree."""
        super().__init__(self._say)
        self._announce = announce
        self.doing = "the round"
        """What a signal lets finish, for the message."""
        self.signal = 0
        """The number of the signal that all processes agreed to end at; 0 before."""

    def agreed(self) -> bool:
        """Whether any process has got a signal, the same answer on every one. Collective until it is true."""
        self.signal = self.signal or any_process(self.received)
        return self.signal > 0

    def note(self, completed: int, saved: Path | None) -> str:
        """What to tell about the end, and how to go on."""
        return (
            f"{name(self.signal)}: stopped after round {completed}; saved {saved}. The same command with "
            "--config.resume_from=auto goes on from there."
        )

    def _say(self, number: int) -> None:
        if self._announce:
            say(f"{name(number)}: finishing {self.doing}, saving, then ending; a second signal ends at once")
