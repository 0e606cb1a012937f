"""The few collectives a round needs.

Before each collective all processes meet (:func:`meet`): one that is missing is an error that names it, not a silence.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar
from weakref import ref

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

TIMEOUT = 1800.0
"""Seconds that a process waits for the others unless :func:`set_timeout` says otherwise."""
_CARD = 96  # bytes of what processes tell each other when they meet
_NEVER = timedelta(days=7)  # of the group of meetings itself, which have time limits of their own
_timeout = TIMEOUT
# The default group, and the gloo group of meetings that belongs to it. Held weakly: torch holds them until they are
# destroyed, and who else did so would keep their threads, one of which may abort a process that ends.
_meetings: tuple[ref[Any], ref[Any]] | None = None


def world_size() -> int:
    """Number of processes; 1 when no process group is up."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def set_timeout(seconds: float) -> None:
    """How long a process waits for the others where it is not said otherwise."""
    global _timeout
    _timeout = seconds


class OtherProcessError(ValueError):
    """Another process failed at what all of them were doing; its own message says why."""


def meet(what: str, word: int = 0, timeout: float | None = None) -> list[int]:
    """Wait until every process has come to this point, and exchange a word; returns the words by rank.

    Every process sends a card to each of the others through gloo, beside NCCL too, so that each finds out by itself who
    is missing; a collective would wait in silence, and torch's monitored barrier tells rank 0 alone.

    Args:
        what: what is about to be done, for messages; the same on every process.
        timeout: seconds to wait for the others; the time of :func:`set_timeout` without.

    Raises:
        OtherProcessError: naming the ranks that are gone, did not come in time, or came to something else.
    """
    if world_size() == 1:
        return [word]
    rank, limit = dist.get_rank(), _timeout if timeout is None else timeout
    cards, gone = _exchange(f"{word} {what}".encode()[:_CARD], limit)
    missing = [r for r, card in enumerate(cards) if not card]
    if missing:
        left = [r for r in missing if r in gone]
        late = [r for r in missing if r not in gone]
        problems = [f"{_ranks(left)} ended before {what!r}"] if left else []
        problems += [f"{_ranks(late)} did not arrive at {what!r} within {limit:g} s"] if late else []
        raise OtherProcessError(f"{' and '.join(problems)}; its own messages say why (this is rank {rank})")
    words, names = zip(*(card.split(" ", 1) for card in cards), strict=True)
    if odd := [r for r in range(len(cards)) if names[r] != names[rank]]:
        raise OtherProcessError(
            f"{_ranks(odd)} came to {names[odd[0]]!r} while rank {rank} came to {names[rank]!r}: "
            "the processes do not run the same code, configuration or data"
        )
    return [int(value) for value in words]


def _exchange(card: bytes, limit: float) -> tuple[list[str], set[int]]:
    """The cards of all ranks, empty where none came within ``limit`` seconds, and the ranks whose connection broke."""
    rank, world, group = dist.get_rank(), world_size(), _meeting_group()
    inbox = torch.zeros(world, _CARD, dtype=torch.uint8)
    inbox[rank, : len(card)] = torch.frombuffer(bytearray(card), dtype=torch.uint8)
    others, gone, deadline = [r for r in range(world) if r != rank], set(), time.monotonic() + limit
    waiting: dict[int, Any] = {}
    for other in others:
        try:
            waiting[other] = dist.irecv(inbox[other], other, group=group)
        except RuntimeError:
            gone.add(other)
    sent = []  # kept until all is done
    for other in others:
        with suppress(RuntimeError):  # whoever is gone is found when its own card is missing
            sent.append(dist.isend(inbox[rank], other, group=group))
    for other, work in waiting.items():
        try:
            work.wait(timedelta(seconds=max(deadline - time.monotonic(), 0.001)))
        except RuntimeError:
            # A wait that ran out breaks the group's other connections too: only before that is a break an ending.
            if time.monotonic() < deadline:
                gone.add(other)
    return [bytes(row.tolist()).rstrip(b"\0").decode(errors="replace") for row in inbox], gone


def _meeting_group() -> Any:
    """A gloo group of all processes, made at the first meeting; it is there beside NCCL."""
    global _meetings
    group = _meetings[1]() if _meetings and _meetings[0]() is dist.group.WORLD else None
    if group is None:
        try:
            group = dist.new_group(backend="gloo", timeout=_NEVER)
        except RuntimeError as error:
            raise OtherProcessError(
                f"the processes cannot reach each other over TCP ({error}). On several machines set GLOO_SOCKET_IFNAME "
                "to the network interface that connects them, such as eth0."
            ) from error
        _meetings = ref(dist.group.WORLD), ref(group)
    return group


def _ranks(ranks: Sequence[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))


def sum_over_processes(value: Tensor, what: str = "a sum over processes") -> Tensor:
    """The sum of ``value`` over all processes, on every process. NCCL sums on the GPU alone: it goes there and back.

    Raises OtherProcessError, naming ``what`` was to be summed, when a process does not come.
    """
    if world_size() == 1:
        return value
    meet(what)
    on_gpu = dist.get_backend() == "nccl" and not value.is_cuda
    total = value.cuda() if on_gpu else value.clone()
    dist.all_reduce(total)
    return total.to(value.device)


def mean_over_processes(value: Tensor, what: str = "a mean over processes") -> Tensor:
    """The mean of ``value`` over all processes, on every process. A NaN anywhere becomes a NaN everywhere."""
    return sum_over_processes(value, what) / world_size()


def gather_over_processes(items: Sequence[T], what: str = "gathering results") -> list[T]:
    """The items of all processes, by rank, on every process; they are pickled."""
    if world_size() == 1:
        return list(items)
    meet(what)
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, list(items), group=_meeting_group())
    return [item for part in parts for item in part]


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace each gradient by its mean over processes, in one collective.

    A round has one optimizer step and a LoRA has few parameters, so one flat all-reduce at its end replaces a
    DistributedDataParallel wrapper and its hooks in every backward. A parameter that the loss does not reach has no
    gradient on any process and keeps none: a zero would let weight decay act on it.
    """
    if world_size() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = mean_over_processes(torch.cat([g.reshape(-1) for g in gradients]), "averaging the gradient")
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def together(work: Callable[[], object], what: str, timeout: float | None = None) -> None:
    """Do this process's part; when it fails on any process, raise on every one, so that none waits for another.

    The process that failed raises its own error, the others OtherProcessError with its rank and message; ``timeout`` as
    in :func:`meet`.
    """
    failure: Exception | None = None
    try:
        work()
    except Exception as error:
        failure = error
    if not any(meet(what, int(failure is not None), timeout)):
        return
    texts = gather_over_processes(["" if failure is None else str(failure) or repr(failure)], f"what failed: {what}")
    if failure is not None:
        raise failure
    raise OtherProcessError(f"{what} failed on {by_rank(texts)}")


def by_rank(texts: Sequence[str]) -> str:
    """``rank 1: text; ranks 2, 3: other text`` of one text a rank, those without one left out."""
    ranks: dict[str, list[int]] = {}
    for rank, text in enumerate(texts):
        if text:
            ranks.setdefault(text, []).append(rank)
    return "; ".join(f"{_ranks(own)}: {text}" for text, own in ranks.items())
