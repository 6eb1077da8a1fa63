"""Passwords in addresses and commands, which no message, log or file may show. Knows nothing of where they are used."""

import logging
import re
from collections.abc import Iterable

HIDDEN = "***"
SECRET = r"(?:pass|pw|token|secret|key|auth|sig|credential)"
WITH_USER = re.compile(r"(://[^\s:@/?#]*:)[^\s'\"]*@")
"""To the last @: a password may hold one, and a slash, though an address must not."""
USER_ALONE = re.compile(r"(://)[^\s:@/?#]+@")
"""A token may stand where a user does."""
IN_QUERY = re.compile(rf"([?&;][\w.-]*{SECRET}[\w.-]*=)[^\s&;#'\")]+", re.IGNORECASE)
FLAG = re.compile(rf"(--[\w-]*{SECRET})(=.*)?", re.IGNORECASE)


def redacted(text: str) -> str:
    """`text` with `***` for each password: `rtsp://user:***@host`, `?token=***`."""
    if "://" not in text:
        return text
    return IN_QUERY.sub(rf"\1{HIDDEN}", USER_ALONE.sub(rf"\1{HIDDEN}@", WITH_USER.sub(rf"\1{HIDDEN}@", text)))


def redacted_command(words: Iterable[str]) -> list[str]:
    """A command line without the values of flags such as `--hub_token`, and without passwords in addresses."""
    found, hide = [], False
    for word in words:
        flag = FLAG.fullmatch(word)
        if hide and not word.startswith("--"):
            word = HIDDEN
        elif flag and flag[2]:
            word = f"{flag[1]}={HIDDEN}"
        hide = bool(flag and not flag[2])
        found.append(redacted(word))
    return found


class Redacting(logging.Filter):
    """For a logger: its messages without passwords."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redacted(record.getMessage()), ()
        return True
