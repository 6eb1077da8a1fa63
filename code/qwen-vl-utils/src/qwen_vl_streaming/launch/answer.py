"""How a program answers a script that started it to learn something: on a channel of its own, since libraries written
in C may print to stdout at any time. launch.sh has the other end. Imports only light modules."""

import os

CHANNEL = "QWENVL_ANSWER"
"""Environment variable: the file descriptor of the channel."""


def answer(text: str) -> None:
    """Writes `text` to the script that asked, or to stdout if a person did."""
    if CHANNEL not in os.environ:
        print(text)
        return
    with open(int(os.environ[CHANNEL]), "w", encoding="utf-8", closefd=False) as channel:
        channel.write(f"{text}\n")
