"""Runs tasks in worker processes. Does not depend on what the tasks do."""

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from multiprocessing import connection, get_context, parent_process
from typing import Any

from qwen_vl_streaming.common.errors import InputError


def run_tasks(
    function: Callable[[Any], Any],
    tasks: Iterable[Any],
    workers: int,
    initializer: Callable[..., None] | None = None,
    *arguments: Any,
) -> Iterator[Any]:
    """Yield function(task) for each of `tasks`, in order of completion.

    Each worker first calls initializer(*arguments). At most two tasks per worker are in flight. With one worker
    everything runs in this process. Raises what a task raises, and InputError if a worker is killed.
    """
    if workers == 1:
        if initializer:
            initializer(*arguments)
        yield from map(function, tasks)
        return
    tasks, stops = iter(tasks), signal.getsignal(signal.SIGINT) != signal.SIG_IGN
    pool = ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_start_worker, initargs=(stops, initializer, arguments)
    )
    try:
        with _ignoring_interrupts():
            running = {pool.submit(function, task) for task in islice(tasks, 2 * workers)}
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            running |= {pool.submit(function, task) for task in islice(tasks, len(done))}
            for future in done:
                yield future.result()
    except BrokenProcessPool as error:
        raise InputError(
            "a worker process was killed, possibly because memory ran out: run the same command again to resume, or "
            "use fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    """Processes that are started within inherit that SIGINT is ignored: Ctrl-C while they start would print a traceback
    of each. Does nothing in a thread, where Python does not set signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _start_worker(stops: bool, initializer: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    """`stops`: Ctrl-C ends this process, as it does the one that started it."""
    if stops:
        signal.signal(signal.SIGINT, lambda *_: os._exit(128 + signal.SIGINT))
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    if initializer:
        initializer(*arguments)


def _exit_with_parent() -> None:
    """Exit when the parent dies. A killed parent cannot stop its workers, which would otherwise wait forever."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
