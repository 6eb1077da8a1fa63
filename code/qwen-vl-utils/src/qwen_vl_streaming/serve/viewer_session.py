"""One session of a viewer, from session.update to the last response.done: the wait for room, the frames, the responses.

Runs in the event loop and never blocks it: threads make clips of frames and hand them over, models run elsewhere.
"""

import logging
import time
from dataclasses import asdict
from pathlib import Path

from ..common.clock import now
from ..common.errors import InputError
from ..video.clip_recorder import ClipRecorder
from ..video.frames import FRAMES_PER_CLIP
from ..video.sources import Clip
from .admission import Ticket
from .client_frames import ClientFrames, read_frame
from .connection import Connection, Refused
from .frames import BuiltClip, ClipBuilder, PreparedClip
from .own_source import Opened, OwnSource, ShownClip
from .request import Plan, Request
from .response import Response
from .server import Server
from .workers import Worker

logger = logging.getLogger(__name__)


class ViewerSession:
    def __init__(self, request: Request, server: Server, connection: Connection):
        self.request, self.server, self.connection = request, server, connection
        self.ticket: Ticket | None = None
        self.responses: dict[str, Response] = {}
        self.own: OwnSource | None = None
        self.frames: ClientFrames | None = None
        """Of a client, once there is room."""
        self.recorder: ClipRecorder | None = None
        self.ended = False
        """No more frames are taken."""
        self.clips: list[tuple[float, float | None]] = []
        """Of each clip, when it was complete, and the capture time of its newest frame."""
        self.dropped = 0
        """Frames that were not needed."""
        self.progress = 0.0
        """When a clip was complete, or there was room, by the monotonic clock."""

    @property
    def all_over(self) -> bool:
        return all(response.over for response in self.responses.values())

    @property
    def active(self) -> bool:
        """It runs or waits."""
        return self.ticket is not None or bool(self.own and not self.ended) or not self.all_over

    @property
    def busy(self) -> bool:
        """The client need not send anything now."""
        return self.ticket is not None or bool(self.own and not self.ended) or (self.ended and not self.all_over)

    @property
    def stalls(self) -> bool:
        """Clips should have come, and have not for too long."""
        silent = time.monotonic() - self.progress > self.server.settings.limits.seconds_idle
        return silent and not (self.all_over or self.busy)

    def leave(self, why: str) -> None:
        """Give up what it has or waits for; `why` is the status of its responses."""
        self.ended = True
        if self.ticket is not None:
            self.server.admission.leave(self.ticket)
            self.ticket = None
        if self.own is not None:
            self.own.stop()
        for response in self.responses.values():
            response.cancel(why)

    def begin(self) -> None:
        """Ask for room, for a source of the server's own as soon as it is open. Raises Refused."""
        request = self.request
        if request.own_source is not None:
            self.own = self.server.own_source(request.own_source, request.models[0], self._notify)
            self.own.keep = self._keep
            return
        clips = None if request.frames is None else -(-request.frames // FRAMES_PER_CLIP)
        budget = request.models[0].budget
        size = budget.size(*request.picture, frames=FRAMES_PER_CLIP * (clips or 0))
        about = {}
        if clips is not None:  # by which `replay --video` finds the same clips
            about["video"] = {"fps": request.fps, "budget": asdict(budget)}
        self._ask_for_room(Opened(size, FRAMES_PER_CLIP / request.fps, clips, about))

    def _notify(self, what: Opened | ShownClip | Exception | None) -> None:
        """Called by a source of the server's own."""
        own = self.own
        if own is None or own.stopped:
            return
        if isinstance(what, Opened):
            try:
                self._ask_for_room(what)
            except (Refused, InputError) as refused:
                own.stop()
                self.ended = True
                self.connection.refuse(refused)
        elif isinstance(what, ShownClip):
            for number, (picture, moment) in enumerate(zip(what.pictures, what.times, strict=True), 1):
                last = what.last and number == len(what.pictures)
                shown = {"time": moment, "bytes": len(picture), **({"last": True} if last else {})}
                self.connection.send("output_video_frame", droppable=not last, binary=picture, **shown)
            self._feed(what.clip, what.completed, what.times[-1], what.last, in_loop=True)
        else:
            if what is not None:
                self.connection.error("source_failed", str(what))
            self._end_responses(explain=what is None)

    def _ask_for_room(self, opened: Opened) -> None:
        """Ask for a session in each model; they are opened as soon as there is room. Raises Refused."""
        plans = {model.name: self.server.plan(model, self.request.question, opened) for model in self.request.models}

        def granted(workers: dict[str, Worker] | None) -> None:
            self.ticket = None
            if workers is None:
                self.leave("cancelled")
                self.connection.error("failed", "the model is not available any more")
            else:
                self._open(workers, plans, opened)

        self.ticket = Ticket(
            {name: plan.blocks for name, plan in plans.items()},
            granted,
            lambda place: self.connection.send("session.queued", place=place),
        )
        if not self.server.admission.request(self.ticket):
            self.ticket = None
            raise Refused("queue_full", "all sessions are taken and too many viewers wait: try again later")

    def _open(self, workers: dict[str, Worker], plans: dict[str, Plan], opened: Opened) -> None:
        """Open the responses in `workers`, tell the client, and begin to watch."""
        request, server, connection = self.request, self.server, self.connection
        source, (height, width) = request.source, opened.size
        if self.own is not None:
            source = {**source, "width": width, "height": height}
        about = {**opened.about, "source": source.get("name", "client"), "question": request.question}
        for name, worker in workers.items():
            plan, model = plans[name], server.models[name]
            response = Response(
                model, worker, plan.most, self.captured, lambda: self.dropped, connection, server.metrics
            )
            self.responses[name] = response
            record = server.record_path(response.id, model.variant.name)
            if request.keep:
                self.recorder = self.recorder or ClipRecorder(record.with_suffix(".clips.safetensors"))
                about["kept"] = self.recorder.path.name
            options = {**plan.limits, "schedule": request.schedules[name], "record": record, "about": dict(about)}
            worker.open(response.id, response, plan.blocks, plan.template, plan.layout, options)
        window = server.settings.window
        session = {
            "models": [*workers],
            "question": request.question,
            "schedule": request.schedules[request.models[0].name],
            "source": source,
            "frame": {"width": width, "height": height},
            "window": window and list(window),
        }
        connection.send("session.updated", session=session)
        for response in self.responses.values():
            connection.send("response.created", response={"id": response.id, "model": response.model.name})
        self.progress = time.monotonic()
        if self.own is not None:
            self.own.begin()
        else:
            builder = ClipBuilder(request.fps, request.frames)
            self.frames = ClientFrames(server, builder, opened.size, self._keep)

    # Frames

    def captured(self, clip: int) -> tuple[float, float | None] | None:
        """For a clip (1…) that has come, when it was complete and the capture time of its newest frame."""
        return self.clips[clip - 1] if 1 <= clip <= len(self.clips) else None

    async def append(self, event: dict, data: bytes, arrived: float) -> None:
        """Take the frame in `data`, which `event` announced and which `arrived` then. Raises Refused or BadFrame."""
        form, moment = read_frame(event, data, self.server.settings.limits)
        if self.frames is None or self.ended:
            raise Refused("invalid_event", "no session takes frames now: send session.update, wait for session.updated")

        def feed(prepared: PreparedClip, clip: BuiltClip) -> None:
            self._feed(prepared, arrived, clip.time, clip.last)
            for name in self.responses:
                self.server.metrics.share.labels(name).observe(now() - arrived)

        used = await self.frames.add(data, form, moment, feed)
        self.server.metrics.frames.labels("used" if used else "dropped").inc()
        self.dropped += not used
        self.connection.send(
            "input_video_frame.acknowledged",
            droppable=True,
            event_id=event.get("event_id"),
            time=moment,
            age_ms=round(1e3 * (now() - arrived), 2),
            dropped=self.dropped,
            waiting={name: response.waiting for name, response in self.responses.items()},
            deadline_misses={name: response.misses for name, response in self.responses.items()},
        )

    def _keep(self, clip: BuiltClip | Clip) -> None:
        if self.recorder is not None:
            try:
                self.recorder.add(clip.frames)
            except InputError as error:
                logger.error("%s", error)
                self.recorder = None

    def _feed(
        self, clip: PreparedClip, completed: float, moment: float | None, last: bool, in_loop: bool = False
    ) -> None:
        """Hand a clip to the models; a client's in the thread that has prepared it, without a wait for the loop."""
        self.clips.append((completed, moment))
        self.progress = time.monotonic()
        if last:
            self.ended = True
        for response in self.responses.values():
            response.feed(clip, completed, last, at_once=not in_loop)
            if response.waiting > self.server.settings.limits.clips_waiting:
                response.cancel("too_slow")

    async def end_input(self) -> None:
        """The source has ended, or the viewer has seen enough of one of the server's own. Raises Refused."""
        if self.own is not None and not self.ended:
            self.own.stop()
            return self._end_responses()
        if self.frames is None:
            raise Refused("invalid_event", "no session takes frames now")
        if not self.ended:
            at = now()
            await self.frames.finish(lambda prepared, clip: self._feed(prepared, at, clip.time, clip.last))
        self._end_responses()

    def _end_responses(self, explain: bool = True) -> None:
        if self.ended:
            return
        self.ended = True
        if not self.clips:
            if explain:
                self.connection.error("invalid_event", "the source has ended before one clip was complete")
            return self.leave("cancelled")
        for response in self.responses.values():
            response.end()


def kept_clips(record: Path, about: dict) -> Path | None:
    """The file of the clips that a viewer agreed to have kept, for the record in `record`."""
    name = about.get("kept")
    return record.with_name(name) if isinstance(name, str) and Path(name).name == name else None
