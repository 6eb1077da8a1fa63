"""Random changes of bytes and of JSON values, for the fuzzers. Does not depend on what is tested."""

import json
import random
from collections.abc import Iterable
from copy import deepcopy

JUNK = [b"\0", b"\xff", b'"', b"{", b"}", b"\\ud800", b"\\u0000", b"[" * 3000, b"\xef\xbb\xbf", b"\n", b"," * 9]
VALUES = [
    *(None, True, False, 0, -1, 1, 2, 0.5, -0.0, 1e-320, 1e308, 2**31, 2**63, 2**64, -(2**70), 10**400),
    *(float("nan"), float("inf"), -float("inf")),
    *(
        "",
        " ",
        "x",
        "\0",
        "\ud800",
        "é\u2028",
        "../../../up",
        "/etc/passwd",
        "." * 300,
        "x" * 70_000,
        "{0}",
        "<script>",
    ),
    *([], {}, [[]], [None], [-1], {"": []}, [0] * 1000, "wait-3", "random-2", "group", "origin", "nan"),
]


def mutate_bytes(data: bytes, rng: random.Random, max_changes: int = 4) -> bytes:
    """Flip a bit, insert, repeat, overwrite, delete or truncate bytes, one to `max_changes` times."""
    mutant = bytearray(data)
    for _ in range(rng.randint(1, max_changes)):
        at = rng.randrange(len(mutant) + 1)
        length = rng.choice([1, 3, 17, 512])
        action = rng.randrange(6)
        if action == 0 and mutant:
            mutant[at % len(mutant)] ^= 1 << rng.randrange(8)
        elif action == 1:
            del mutant[at : at + length]
        elif action == 2:
            mutant[at:at] = rng.choice(JUNK)
        elif action == 3:
            mutant[at:at] = mutant[at : at + length]
        elif action == 4:
            mutant[at : at + length] = rng.randbytes(length)
        elif rng.random() < 0.3:
            del mutant[at:]
    return bytes(mutant)


def mutate_json(data: object, rng: random.Random) -> object:
    """Return a copy of a JSON value with one to three values replaced, removed, repeated or wrapped."""
    tree = json.loads(json.dumps(data))
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        values = list(_find_values(tree))
        if not values:
            return deepcopy(rng.choice(VALUES))
        container, key = rng.choice(values)
        action = rng.randrange(8)
        if action < 4:
            container[key] = deepcopy(rng.choice(VALUES))
        elif action == 4:
            del container[key]
        elif action == 5:
            container[key] = [deepcopy(container[key]) for _ in range(rng.randint(1, 3))]
        elif action == 6:
            container[key] = deepcopy(rng.choice([container for container, _ in values]))
        elif isinstance(container[key], bool) or not isinstance(container[key], int | float):
            container[key] = json.dumps(container[key])
        else:
            container[key] = rng.choice([-1, 10, 0.1]) * container[key] + rng.choice([0, 1, 0.5])
    return tree


def _find_values(tree: object) -> Iterable[tuple]:
    """Yield (container, key) of each value in a tree; of a list, the first eight items only."""
    if isinstance(tree, dict):
        keys = list(tree)
    elif isinstance(tree, list):
        keys = list(range(len(tree)))[:8]
    else:
        return
    for key in keys:
        yield tree, key
        yield from _find_values(tree[key])
