"""Runs one stream, or many, in real time: when a slot begins, which device does what, what is recorded.

Knows nothing of files, cameras and terminals."""

from .modes import open_session
from .perception_client import PerceptionClient, PerceptionLost
from .record import MODES
from .recorded import caption_sessions
from .session import Session
from .session_log import TimedToken
from .session_pool import SessionPool
from .slot_scheduler import GREEDY

__all__ = [
    "GREEDY",
    "MODES",
    "PerceptionClient",
    "PerceptionLost",
    "Session",
    "SessionPool",
    "TimedToken",
    "caption_sessions",
    "open_session",
]
