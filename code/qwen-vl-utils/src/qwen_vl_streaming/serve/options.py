"""The command line of `serve`, and what it names: models, sources, address. Knows nothing about sessions."""

import argparse
import ipaddress
import os
import re
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..common.errors import InputError, OneLineParser
from ..common.paths import PROJECT, find_model, look_up
from ..common.redact import hide, hide_address
from ..devices import DEVICE_HELP, choose_device, look
from ..live.options import check_limits
from ..live.setup import CLIPS, TOKENS_PER_CLIP
from ..model.loading import DTYPES
from ..model.quantization import WEIGHTS, WEIGHTS_HELP, check_precision
from ..video.formats import SCHEMES
from ..video.opening import SYNTHETIC
from ..video.pixel_budget import BUDGETS

TOKEN_VARIABLE = "QWEN2_5_VL_SERVE_TOKEN"
TOKEN = re.compile(r"[A-Za-z0-9._~-]{16,200}")
"""What browsers can send as a WebSocket subprotocol, and long enough not to be guessed."""
NAME = re.compile(r"[\w.-]{1,40}")
RECORDS = Path("serve_output")
BACKLOG = 2048
LIMITS = {
    "port": (0, 65535),
    "sessions": (1, 4096),
    "sessions_per_client": (1, 10**6),
    "queue": (0, 10**6),
    "max_clips": (1, 10**6),
    "max_new_tokens": (1, 10**6),
}
"""The smallest and the largest value of numeric flags."""


@dataclass(frozen=True)
class Limits:
    """What one client may do."""

    frame_bytes: int = 4 * 2**20
    """Bytes of an encoded frame."""
    pixels: int = 2560 * 1600
    """Pixels of a frame before it is resized."""
    message_bytes: int = 16 * 2**10
    """Bytes of a JSON message."""
    messages_per_second: int = 40
    """JSON messages and frames; BURST times as many may come at once."""
    question_characters: int = 500
    question_tokens: int = 500
    clips_waiting: int = 60
    """Clips that a model may be behind; then its response ends as too slow."""
    seconds_idle: float = 60.0
    messages_waiting: int = 512
    """Messages that a client has not read; then it is disconnected."""
    mistakes: int = 50
    """Messages that may be refused; then it is disconnected."""


@dataclass(frozen=True)
class Settings:
    """The command line, checked."""

    models: dict[str, str]
    """Checkpoints by name."""
    host: str
    port: int
    token: str
    """Empty: no token is needed."""
    sources: dict[str, str]
    origins: tuple[str, ...]
    sessions: int
    per_client: int
    queue: int
    window: tuple[int, int] | None
    max_clips: int | None
    max_new_tokens: int
    records: Path
    devices: tuple[str, ...]
    dtype: torch.dtype
    weights: str | None
    """The precision of the linear layers, one of `quantization.WEIGHTS`, or None for that of the checkpoints."""
    budget: argparse.Namespace
    """Asked values of PixelBudget; None for the checkpoint's."""
    limits: Limits = Limits()

    @property
    def most_clips(self) -> int | None:
        """Clips of a session at most, or None for any number."""
        return self.max_clips or (None if self.window else CLIPS)

    @property
    def pool_clips(self) -> int:
        return self.max_clips or CLIPS

    @property
    def pool_limits(self) -> dict:
        """The max_clips, max_new_tokens and window of a stream."""
        tokens = sys.maxsize if self.window else TOKENS_PER_CLIP * self.pool_clips
        return {"max_clips": self.pool_clips, "max_new_tokens": tokens, "window": self.window}


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def parse(description: str | None, environment: Mapping[str, str], arguments: Sequence[str] | None = None) -> Settings:
    """Parse and check the command line. Raises InputError, or ends the program with one line."""
    parser = OneLineParser(
        prog="python -m qwen_vl_streaming.serve",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--model",
        action="append",
        required=True,
        metavar="[NAME=]DIR",
        help="folder or hub id of a checkpoint; several are shown side by side. Default name: its variant",
    )
    add("--host", default="127.0.0.1", help=f"other addresses need {TOKEN_VARIABLE} to be set (default: %(default)s)")
    add("--port", type=int, default=8000, help="0 for any that is free (default: %(default)s)")
    add(
        "--source",
        action="append",
        default=[],
        metavar="NAME=SOURCE",
        help=f"a source of the server's own that viewers may choose by its name: a file, /dev/videoN, an address, or "
        f"{SYNTHETIC}",
    )
    add(
        "--origin",
        action="append",
        default=[],
        metavar="URL",
        help="a further origin, such as https://demo.example.org, from which browsers may connect",
    )
    add("--sessions", type=int, help="sessions at once per model and device, at most (default: 64 on a GPU, else 4)")
    add("--sessions-per-client", type=int, default=8, metavar="N", help="connections per address (default: 8)")
    add("--queue", type=int, default=32, metavar="N", help="viewers that may wait for a session (default: 32)")
    add(
        "--window",
        type=int,
        nargs=2,
        default=[60, 300],
        metavar=("CLIPS", "TOKENS"),
        help="clips and tokens that a session attends to; 0 0 for all, then --max-clips limits it (default: 60 300)",
    )
    add("--max-clips", type=int, metavar="N", help=f"clips of a session (default: any number; {CLIPS} without window)")
    add(
        "--max-new-tokens",
        type=int,
        default=300,
        metavar="N",
        help="tokens about a recording, and after the end of a stream (default: 300, as in eval.sh)",
    )
    add("--records", type=Path, default=RECORDS, metavar="DIR", help="where records are written (default: %(default)s)")
    add("--device", default="", help=f"{DEVICE_HELP}, or several with commas; default: all GPUs")
    add("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on the CPU")
    add("--weights", choices=WEIGHTS, help=WEIGHTS_HELP)
    for name in ("--min-pixels-per-frame", "--max-pixels-per-frame", "--max-pixels-per-video"):
        add(name, type=int, metavar="N", help="default: as the checkpoint was trained")
    add("--budget", choices=BUDGETS, help="see `live --help`; default: as the checkpoint was trained")
    values = parser.parse_args(arguments)
    check_limits(parser, values, LIMITS)
    if values.window != [0, 0] and min(values.window) < 1:
        parser.error(f"--window {values.window[0]} {values.window[1]} must be two numbers of at least 1, or 0 0")
    token = environment.get(TOKEN_VARIABLE, "")
    if token and not TOKEN.fullmatch(token):
        raise InputError(f"{TOKEN_VARIABLE} must be 16 to 200 letters, digits or . _ ~ -: set another one")
    hide(token)
    if not token and not is_loopback(values.host):
        raise InputError(
            f"--host {values.host} can be reached from other machines: set {TOKEN_VARIABLE} to a secret that viewers "
            "need, or leave --host out and use an SSH tunnel"
        )
    for origin in values.origin:
        if not re.fullmatch(r"https?://[^/\s\[\]?#@]+", origin, re.IGNORECASE):
            raise InputError(f"--origin {origin} is not an origin: give scheme, host and port, without a path")
    devices = choose_devices(values.device, environment)
    cuda = devices[0].startswith("cuda")
    dtype = DTYPES[values.dtype or ("bfloat16" if cuda else "float32")]
    for device in devices:
        check_precision(values.weights, device, dtype)
    return Settings(
        models=named_models(values.model),
        host=values.host,
        port=values.port,
        token=token,
        sources=named_sources(values.source),
        origins=tuple(origin.lower() for origin in values.origin),
        sessions=values.sessions or (64 if cuda else 4),
        per_client=values.sessions_per_client,
        queue=values.queue,
        window=None if values.window == [0, 0] else tuple(values.window),
        max_clips=values.max_clips,
        max_new_tokens=values.max_new_tokens,
        records=values.records,
        devices=devices,
        dtype=dtype,
        weights=values.weights,
        budget=values,
    )


def choose_devices(asked: str, environment: Mapping[str, str]) -> tuple[str, ...]:
    """The devices that `asked` names; by default all GPUs, else the CPU."""
    found = look(environment)
    if not asked and found.usable > 1:
        return tuple(f"cuda:{index}" for index in range(found.usable))
    chosen = [choose_device(name.strip(), found)[0] for name in asked.split(",")]
    if len({*chosen}) < len(chosen):
        raise InputError(f"--device {asked} names a device twice")
    return tuple(chosen)


def split_name(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    return (name, value) if equals and NAME.fullmatch(name) else ("", text)


def named_models(given: Sequence[str]) -> dict[str, str]:
    """Paths or hub ids by name; a name that was not given is empty or a number, to be replaced by the variant."""
    models: dict[str, str] = {}
    for number, text in enumerate(given):
        name, path = split_name(text)
        name = name or f"#{number}"
        if name in models:
            raise InputError(f"--model {name}=… is given twice: choose another name")
        models[name] = find_model(path, PROJECT)
    return models


def named_sources(given: Sequence[str]) -> dict[str, str]:
    sources: dict[str, str] = {}
    for text in given:
        name, value = split_name(text)
        hide_address(value)
        if not name or not value:
            lacks = "name" if value else "source"
            raise InputError(f"--source {text} has no {lacks}: give NAME=SOURCE, the name without / and spaces")
        if name in sources:
            raise InputError(f"--source {name}=… is given twice: choose another name")
        if "://" in value:
            if value.partition("://")[0].lower() not in SCHEMES:
                raise InputError(f"--source {name}: {value} is not a stream: give {', '.join(SCHEMES)}, or a file")
        elif value != SYNTHETIC:
            value = str(look_up(value, PROJECT))
            if not os.path.exists(value):
                raise InputError(f"--source {name}: {value} does not exist: check the path")
            if os.path.isdir(value):
                raise InputError(f"--source {name}: {value} is a folder: give a file")
        sources[name] = value
    return sources


def bind(host: str, port: int) -> socket.socket:
    """A listening socket, opened before models are loaded. Raises InputError."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, proto)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)  # two that start at once are not both given the port
    except OSError as error:
        raise InputError(
            f"--host {host} --port {port} cannot be opened ({error.strerror}): give another port or address"
        ) from error
    return listener
