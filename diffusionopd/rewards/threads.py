"""Several requests at a time, in threads that do not keep the program from ending."""

import itertools
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_threads(function: Callable[[Item], Result], items: Sequence[Item], threads: int) -> list[Result]:
    """`[function(item) for item in items]`, up to `threads` at a time.

    The first exception is raised once what is under way has ended; what has not begun is left out then. Daemon threads
    in place of a ThreadPoolExecutor's, which the interpreter waits for at its end, even when a server keeps them.
    """
    results: dict[int, Result] = {}
    errors: list[BaseException] = []
    turn = itertools.count()

    def work() -> None:
        while not errors and (index := next(turn)) < len(items):
            try:
                results[index] = function(items[index])
            except BaseException as error:
                errors.append(error)

    running = [threading.Thread(target=work, daemon=True) for _ in range(min(threads, len(items)))]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    if errors:
        raise errors[0]
    return [results[index] for index in range(len(items))]
