"""One decision for all nodes: node 0 collects what each has found, decides, and sends the result."""

import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from qwen_vl_streaming.common.errors import InputError, first_line

TIMEOUT = 900.0
"""Seconds that nodes wait for each other, as torchrun does."""
BEAT = 10.0
"""Seconds between two heartbeats of node 0, which may plan for hours."""
SILENCE = 120.0
"""Seconds without a heartbeat after which the others stop waiting."""
NOTICE = 10.0
"""Seconds after which a node prints what it waits for."""
POLL = 0.1
ALIVE = "alive"
"""The key of node 0's count of heartbeats."""


def agree(
    node: int,
    nodes: int,
    address: str,
    port: int,
    look: Callable[[], object],
    decide: Callable[[list], object],
    timeout: float = TIMEOUT,
):
    """What node 0 decides from what all nodes found. Called on all of them at once; values are JSON.

    `look` runs on each node, and `decide` on node 0 with their results in order. Raises InputError on all nodes where
    either does, and where the nodes do not find each other within `timeout` seconds. `decide` may take any time. The
    port is free again when this returns.
    """
    from torch.distributed import DistError, TCPStore

    seconds = timedelta(seconds=timeout)
    interrupted = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python handles signals only after the store has connected
    try:
        with _notice(lambda: f"node 0 at {address}:{port}"):
            store = TCPStore(address, port, is_master=node == 0, wait_for_workers=False, timeout=seconds)
        if node == 0:
            with _heartbeat(store.clone()):
                return _lead(store, nodes, _attempt(look), decide, timeout)
        return _follow(store, node, _attempt(look))
    except DistError as error:
        reason = first_line(error)
        raise InputError(
            f"the nodes cannot agree on a plan ({reason}): check MASTER_ADDR, or change MASTER_PORT; and see what "
            "node 0 says"
        ) from error
    finally:
        signal.signal(signal.SIGINT, interrupted)


@contextmanager
def _notice(what: Callable[[], str]) -> Iterator[None]:
    """Prints once, after NOTICE seconds, what the block waits for."""

    def say() -> None:
        print(f"planning: waiting for {what()}", file=sys.stderr, flush=True)

    timer = threading.Timer(NOTICE, say)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def _heartbeat(store) -> Iterator[None]:
    """Counts heartbeats in `store`, a connection of its own, until the block ends."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.is_set():
            store.add(ALIVE, 1)
            ended.wait(BEAT)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _attempt(what: Callable[[], object]) -> dict:
    try:
        return {"value": what()}
    except InputError as error:
        return {"error": str(error)}


def _lead(store, nodes: int, mine: dict, decide: Callable[[list], object], timeout: float):
    others, found = range(1, nodes), {0: mine}
    own = f", to tell them: {mine['error']}" if "error" in mine else ""
    came = _wait(store, [f"node {other}" for other in others], timeout, own)
    for other in others:
        if f"node {other}" in came:
            found[other] = json.loads(store.get(f"node {other}"))
    errors = [f"node {other}: {one['error']}" for other, one in found.items() if "error" in one]
    if missing := [f"node {other}" for other in others if other not in found]:
        errors.append(
            f"no answer for {timeout:.0f} s ({', '.join(missing)}): run the same command on every node, with its own "
            "NODE_RANK"
        )
    plan = {"error": errors[0]} if errors else _attempt(lambda: decide([one["value"] for one in found.values()]))
    store.set("plan", json.dumps(plan))
    _wait(store, [f"read {other}" for other in found if other], timeout)
    return _value(plan)


def _follow(store, node: int, mine: dict):
    from torch.distributed import DistError

    store.set(f"node {node}", json.dumps(mine))
    _wait_for_plan(store)
    plan = json.loads(store.get("plan"))
    store.set(f"read {node}", "yes")
    # The launcher of node 0 uses the same port: this node's would take this store for its own.
    try:
        while True:
            store.check(["plan"])
            time.sleep(POLL)
    except DistError:
        return _value(plan)


def _value(plan: dict):
    if "error" in plan:
        raise InputError(plan["error"])
    return plan["value"]


def _wait(store, keys: list[str], timeout: float, more: str = "") -> list[str]:
    """Those of `keys` that are set, once all are or `timeout` seconds have passed."""
    end = time.monotonic() + timeout
    missing = [key for key in keys if not store.check([key])]
    with _notice(lambda: ", ".join(missing) + more):
        while missing and time.monotonic() < end:
            time.sleep(POLL)
            missing = [key for key in missing if not store.check([key])]
    return [key for key in keys if key not in missing]


def _wait_for_plan(store) -> None:
    """Raises InputError where the heartbeats of node 0 have stopped."""
    beats, heard = -1, time.monotonic()
    with _notice(lambda: "the plan of node 0, which reads the data"):
        while not store.check(["plan"]):
            if (now := store.add(ALIVE, 0)) != beats:
                beats, heard = now, time.monotonic()
            elif time.monotonic() - heard > SILENCE:
                raise InputError(
                    f"node 0 has stopped planning: no sign of life for {SILENCE:.0f} s: see what it says, and start "
                    "all nodes again"
                )
            time.sleep(POLL)
