"""The few collectives that a run needs; each does nothing in a single process.

Small values on the CPU travel over gloo, also beside NCCL. :func:`barrier` and :func:`together` name a process that is
missing; the others end by the time limit of the default process group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any, TypeVar
from weakref import ref

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

TIMEOUT = 1800.0
"""Seconds that a process waits for the others unless :func:`set_timeout` says otherwise."""
LONGEST_TIMEOUT = 12 * 3600.0
"""Seconds that processes may wait for the slowest to encode a large prompt set, or to evaluate its share."""
_timeout = TIMEOUT
# The default group, and the gloo group that belongs to it. Held weakly: torch holds them until they are destroyed, and
# who else did so would keep gloo's threads, one of which may abort an interpreter that ends.
_groups: tuple[ref[Any], ref[Any]] | None = None


class OtherProcessError(ValueError):
    """Raised where another process failed at, or did not come to, what all of them do; its own messages say why."""


def world_size() -> int:
    """Number of processes; 1 when no process group is up."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def set_timeout(seconds: float) -> None:
    """How long a process waits for the others; called before the first collective."""
    global _timeout
    _timeout = seconds


def any_process(flag: int) -> int:
    """The largest ``flag`` of all processes, on every process: not 0 when it is not 0 on any."""
    if world_size() == 1:
        return flag
    largest = torch.tensor(flag)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=_gloo_group())
    return int(largest)


def sum_over_processes(value: Tensor) -> Tensor:
    """The sum of ``value`` over all processes, on every process and on the same device."""
    if world_size() == 1:
        return value
    total = value.clone()
    dist.all_reduce(total, group=_gloo_group() if dist.get_backend() == "nccl" and not value.is_cuda else None)
    return total


def mean_over_processes(value: Tensor) -> Tensor:
    """The mean of ``value`` over all processes, on every process. A NaN anywhere becomes a NaN everywhere."""
    return sum_over_processes(value) / world_size()


def gather_over_processes(items: Sequence[T]) -> list[T]:
    """The items of all processes, by rank, on every process; they are pickled."""
    if world_size() == 1:
        return list(items)
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, list(items), group=_gloo_group())
    return [item for part in parts for item in part]


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace each gradient by its mean over processes, in one collective.

    An optimizer step follows many backward passes and a LoRA has few parameters, so one flat all-reduce replaces a
    DistributedDataParallel wrapper and its hooks in every backward. A parameter that the loss does not reach has no
    gradient on any process and keeps none: a zero would let weight decay act on it.
    """
    if world_size() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = mean_over_processes(torch.cat([g.reshape(-1) for g in gradients]))
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def barrier(what: str, timeout: float | None = None) -> None:
    """Wait until every process has come to ``what``, for ``timeout`` seconds, else those of :func:`set_timeout`.

    Raises OtherProcessError on every process that waited. Rank 0's names all that are missing; the others wait for its
    answer, for LONGEST_TIMEOUT if need be.
    """
    if world_size() == 1:
        return
    seconds = _timeout if timeout is None else timeout
    try:
        dist.monitored_barrier(_gloo_group(), timedelta(seconds=seconds), wait_all_ranks=True)
    except RuntimeError as error:
        said = str(error).strip().splitlines()[0]
        raise OtherProcessError(f"not every process came to {what!r} within {seconds:g} s: {said}") from error


def together(work: Callable[[], T], what: str, timeout: float | None = None) -> T:
    """Do this process's part of ``what`` and return its result; when it fails on any process, raise on every one.

    The process that failed raises its own error, the others OtherProcessError with its rank and message; ``timeout``
    and a missing process as in :func:`barrier`.
    """
    failure: Exception | None = None
    try:
        result = work()
    except Exception as error:
        failure = error
    barrier(what, timeout)
    texts = gather_over_processes(["" if failure is None else str(failure) or repr(failure)])
    if failure is not None:
        raise failure
    if any(texts):
        raise OtherProcessError(f"{what} failed on {by_rank(texts)}")
    return result


def by_rank(texts: Sequence[str]) -> str:
    """``rank 1: text; ranks 2, 3: other text`` of one text per rank, those without one left out."""
    ranks: dict[str, list[str]] = {}
    for rank, text in enumerate(texts):
        if text:
            ranks.setdefault(text, []).append(str(rank))
    return "; ".join(f"rank{'s' * (len(own) > 1)} {', '.join(own)}: {text}" for text, own in ranks.items())


def _gloo_group() -> Any:
    """A gloo group of all processes, made when first needed."""
    global _groups
    group = _groups[1]() if _groups and _groups[0]() is dist.group.WORLD else None
    if group is None:
        try:
            group = dist.new_group(backend="gloo", timeout=timedelta(seconds=max(_timeout, LONGEST_TIMEOUT)))
        except RuntimeError as error:
            raise OtherProcessError(
                f"the processes cannot reach each other over TCP ({error}). On several machines set GLOO_SOCKET_IFNAME "
                "to the network interface that connects them, such as eth0."
            ) from error
        _groups = ref(dist.group.WORLD), ref(group)
    return group
