"""Tasks spread over worker processes. Knows nothing about what they do."""

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import connection, get_context, parent_process
from typing import Any

from qwen_vl_streaming.common.errors import InputError


def run_tasks(
    function: Callable[[Any], Any], tasks: Iterable[Any], workers: int, prepare: Callable[..., None], *arguments: Any
) -> Iterator[Any]:
    """Yield function(task) for each of `tasks`, in the order in which they end, after prepare(*arguments) in each
    worker. At most two tasks a worker are under way. With one worker everything runs in this process.

    Raises what a task raises, and InputError where a worker is killed.
    """
    if workers == 1:
        prepare(*arguments)
        yield from map(function, tasks)
        return
    tasks = iter(tasks)
    pool = ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_start, initargs=(prepare, arguments)
    )
    try:
        running = {pool.submit(function, task) for task in islice(tasks, 2 * workers)}
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            running |= {pool.submit(function, task) for task in islice(tasks, len(done))}
            for future in done:
                yield future.result()
    except BrokenProcessPool as error:
        raise InputError(
            "a worker was killed, perhaps for memory: start again, what was finished is kept, or use fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start(prepare: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    prepare(*arguments)


def _end_with_parent() -> None:
    """A killed parent cannot stop its workers, and they would wait for it for ever."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
