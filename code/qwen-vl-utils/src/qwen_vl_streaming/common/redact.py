"""Removes passwords in addresses and commands, and terminal control characters, from messages, logs and files.

`python -m qwen_vl_streaming.common.redact WORD ...` prints a command line, for launchers that echo their command.
Independent of where the text is used.
"""

import base64
import logging
import re
import sys
from collections.abc import Iterable, Iterator
from urllib.parse import unquote

HIDDEN = "***"
SHORTEST = 4
"""Minimum length of a secret that is hidden everywhere. A shorter one would also match parts of words."""
SCHEME = r"\b(?:rtsps?|rtmp\w*|https?|ftps?|sftp|srt|udp|tcp|tls|rtp|mms\w*|wss?|hls|cache|async|crypto)"
ADDRESS = re.compile(rf"://|{SCHEME}:", re.IGNORECASE)
USER = rf"(?:://|{SCHEME}:(?!//))"
WITH_USER = re.compile(
    rf"({USER}[^\s:?#]{{0,300}}:)(?!//)(?:[^\s'\"]{{0,999}}|(?!\d{{1,5}}(?:[/?#\s,;'\"]|$))\S(?:(?!://).){{0,200}}?)@",
    re.I | re.S,
)
"""Matches a password up to the last @ before any white space or quote, or up to the first @ if there is none before
them. Passwords may contain @ and slashes, although addresses must not. In the second case, a number after the colon is
a port and does not match."""
USER_ALONE = re.compile(r"(://)[^\s:@/?#]+@")
"""Matches a user name without a password, because it may be a token."""
PAIR = re.compile(
    r"((?:(?<![\w.%+~-])|(?=_))[\w.%+~-]{1,100}(?:\[[\w%-]*\])?=)('[^'\s]*'|\"[^\"\s]*\"|(?:(?!_[a-z]+=)(?:[^\s&;#'\")]|['\")](?=\w)))+)",
    re.IGNORECASE,
)
"""Matches a name and its value in an address. A pair may follow an underscore, as in the paths of some cameras."""
SECRET = re.compile(
    r"pas|pw|psw|token|secret|key|auth|sig|cred|session|hdnt|access|code(?!c)|(?<![a-z])(?:sid|pin|p)(?![a-z])",
    re.IGNORECASE,
)
"""Matches in names of pairs whose value is a secret."""
IN_JSON = re.compile(
    r"(?P<quote>[\"'])(?P<name>[\w.-]{0,50}(?:pass|pw|token|secret|key|auth|cred)[\w.-]{0,50})(?P=quote)(?P<colon>\s*:\s*)"
    r"(?P<mark>[\"'])(?:\\.|(?!(?P=mark)).)*(?P=mark)",
    re.IGNORECASE,
)
FLAG = re.compile(r"(--[\w-]*(?:pass\w*|pwd?|psw|token|secret|key|auth|sig|credentials?))(=.*)?", re.IGNORECASE | re.S)
IN_TEXT = re.compile(rf"{FLAG.pattern.removesuffix('(=.*)?')}(\s+|=)(?!-)[^\s:]+", re.IGNORECASE)
"""Matches a secret flag, as in FLAG, and its value in a message."""
_known: dict[str, str] = {}  # maps the secrets of this process to their replacements


def hide(*secrets: str) -> None:
    """Makes `redacted` hide these strings everywhere. Ignores strings shorter than SHORTEST."""
    for secret in secrets:
        if len(secret) >= SHORTEST:
            _known[secret] = HIDDEN


def hide_address(address: str) -> None:
    """Makes `redacted` hide the secrets in `address` everywhere, as written, URL-decoded and as in HTTP basic auth."""
    if (public := redacted(address)) == address:
        return
    _known[address] = public
    user, at, _ = address.partition("://")[2].rpartition("@")
    name, colon, password = user.partition(":")
    alone = password if colon else name  # a user name without a password may be a token
    hide(alone, unquote(alone), base64.b64encode(unquote(user).encode()).decode() if at else "")
    hide(*(pair[2].strip("'\"") for pair in PAIR.finditer(address) if SECRET.search(unquote(pair[1]))))


def secrets(fields: object, named: bool = False) -> Iterator[str]:
    """Yields the strings in parsed JSON whose key, or the key of an enclosing value, names a secret."""
    if isinstance(fields, dict):
        for name, value in fields.items():
            yield from secrets(value, named or bool(FLAG.fullmatch(f"--{name}")))
    elif isinstance(fields, list):
        for value in fields:
            yield from secrets(value, named)
    elif named and isinstance(fields, str):
        yield fields


def redacted(text: str) -> str:
    """Returns `text` with `***` in place of each password: `rtsp://user:***@host`, `?token=***`."""
    for secret in sorted(_known, key=len, reverse=True):
        text = text.replace(secret, _known[secret])
    text = IN_JSON.sub(rf"\g<quote>\g<name>\g<quote>\g<colon>\g<mark>{HIDDEN}\g<mark>", text)
    text = IN_TEXT.sub(rf"\1\2{HIDDEN}", text)
    if not ADDRESS.search(text):
        return text
    text = USER_ALONE.sub(rf"\1{HIDDEN}@", WITH_USER.sub(rf"\1{HIDDEN}@", text))
    return PAIR.sub(lambda pair: pair[1] + HIDDEN if SECRET.search(unquote(pair[1])) else pair[0], text)


def shown(text: str) -> str:
    """Returns `text` on one line, without passwords, and with non-printable characters escaped, such as `\\x1b`."""
    text = redacted(text)
    return text if text.isprintable() else "".join(map(_printed, text))


def _printed(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode()


def redacted_command(words: Iterable[str]) -> list[str]:
    """Returns a command line without the values of flags such as `--hub_token` and without passwords in addresses."""
    found, hide_next = [], False
    for word in words:
        flag = FLAG.fullmatch(word)
        if hide_next and not word.startswith("--"):
            word = HIDDEN
        elif flag and flag[2]:
            word = f"{flag[1]}={HIDDEN}"
        hide_next = bool(flag and not flag[2])
        found.append(redacted(word))
    return found


class Redacting(logging.Filter):
    """A logging filter that removes passwords from messages and tracebacks, and puts each message on one line."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = shown(record.getMessage()), ()
        if record.exc_info:
            record.exc_text = redacted(logging.Formatter().formatException(record.exc_info))
        return True


if __name__ == "__main__":
    print("+", *redacted_command(sys.argv[1:]))
