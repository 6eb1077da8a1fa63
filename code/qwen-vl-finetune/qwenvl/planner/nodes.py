"""One plan for all nodes: node 0 learns what the others found, decides, and tells them. Independent of what it is."""

import json
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta

from qwen_vl_streaming.common.errors import InputError

TIMEOUT = 900.0
"""Seconds that nodes wait for each other, as torchrun does."""
NOTICE = 10.0
"""Seconds after which node 0 names the nodes that it waits for."""
POLL = 0.1


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
    either does, and where the nodes do not find each other. The port is free again when this returns.
    """
    from torch.distributed import DistError, TCPStore

    seconds = timedelta(seconds=timeout)
    interrupted = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python handles signals only after the store has connected
    try:
        store = TCPStore(address, port, is_master=node == 0, wait_for_workers=False, timeout=seconds)
        mine = _attempt(look)
        if node == 0:
            return _lead(store, nodes, mine, decide, timeout)
        return _follow(store, node, mine, timeout)
    except DistError as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(
            f"the nodes cannot agree on a plan ({reason}): check MASTER_ADDR, or change MASTER_PORT; and see what "
            "node 0 says"
        ) from error
    finally:
        signal.signal(signal.SIGINT, interrupted)


def _attempt(what: Callable[[], object]) -> dict:
    try:
        return {"value": what()}
    except InputError as error:
        return {"error": str(error)}


def _lead(store, nodes: int, mine: dict, decide: Callable[[list], object], timeout: float):
    _wait(store, [f"node {other}" for other in range(1, nodes)], timeout)
    found = [mine, *(json.loads(store.get(f"node {other}")) for other in range(1, nodes))]
    errors = [f"node {other}: {one['error']}" for other, one in enumerate(found) if "error" in one]
    plan = {"error": errors[0]} if errors else _attempt(lambda: decide([one["value"] for one in found]))
    store.set("plan", json.dumps(plan))
    _wait(store, [f"read {other}" for other in range(1, nodes)], timeout)
    return _value(plan)


def _follow(store, node: int, mine: dict, timeout: float):
    from torch.distributed import DistError

    store.set(f"node {node}", json.dumps(mine))
    _wait(store, ["plan"], timeout)
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


def _wait(store, keys: list[str], timeout: float) -> None:
    began, noticed = time.monotonic(), False
    while missing := [key for key in keys if not store.check([key])]:
        waited = time.monotonic() - began
        if waited > timeout:
            raise InputError(
                f"no answer for {timeout:.0f} s ({', '.join(missing)}): run the same command on every node, with "
                "its own NODE_RANK"
            )
        if waited > NOTICE and not noticed:
            noticed = True
            print(f"planning: waiting for {', '.join(missing)}", file=sys.stderr)
        time.sleep(POLL)
