"""A real browser for tests: Chromium or Chrome, controlled through a pipe with the DevTools protocol. Requests to the
network are recorded as errors."""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--remote-debugging-pipe",
)
WIRES = 100  # the lowest file descriptor of the pipes, above those in use


def find_browser() -> str:
    """Path of the browser. Skips the test if there is none."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    return found or pytest.skip("no Chromium or Chrome on this machine")


class Browser:
    """Usage: `with Browser(folder) as page: page.open(path); page.run("1 + 1")`. `folder` is a new folder for the
    browser profile."""

    def __init__(self, folder: Path, seconds: float = 60):
        self.program, self.folder, self.seconds = find_browser(), folder, seconds
        self.errors: list[str] = []
        """Errors and warnings of the console, uncaught exceptions, and requests to any URL but file: and data:."""

    def __enter__(self) -> "Browser":
        pipes = [fcntl.fcntl(end, fcntl.F_DUPFD, WIRES) for pair in (os.pipe(), os.pipe()) for end in pair]
        its_in, self._out, self._in, its_out = pipes
        command = [self.program, *FLAGS, f"--user-data-dir={self.folder}", "about:blank"]
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{its_in} 4>&{its_out} {its_in}<&- {its_out}>&-', "bash", *command],
            pass_fds=(its_in, its_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(its_in)
        os.close(its_out)
        self._number, self._read, self._session = 0, b"", {}
        self._events: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._session = {"sessionId": session}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)

    def call(self, method: str, **parameters) -> dict:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters, **self._session}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def _next(self) -> dict:
        end = time.monotonic() + self.seconds
        while b"\0" not in self._read:
            if not select.select([self._in], [], [], max(0, end - time.monotonic()))[0]:
                raise TimeoutError(f"{self.program} said nothing for {self.seconds} s")
            piece = os.read(self._in, 1 << 20)
            if not piece:
                raise RuntimeError(f"{self.program} ended with status {self._process.wait()}")
            self._read += piece
        message, _, self._read = self._read.partition(b"\0")
        message = json.loads(message)
        self._note(message.get("method", ""), message.get("params", {}))
        return message

    def _note(self, event: str, params: dict) -> None:
        self._events.append(event)
        if event == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(params["exceptionDetails"]))
        elif event == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.errors.append(json.dumps(params["args"]))
        elif event == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.errors.append(params["entry"]["text"])
        elif event == "Network.requestWillBeSent" and not params["request"]["url"].startswith(("file:", "data:")):
            self.errors.append(f"requested {params['request']['url']}")

    def open(self, path: Path, width: int = 1200, height: int = 900) -> None:
        """Open a file in a window of `width` x `height` CSS pixels, and wait until it is loaded."""
        mobile = width < 600
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if mobile else 1,
            mobile=mobile,
        )
        self._events.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        while "Page.loadEventFired" not in self._events:
            self._next()

    def run(self, script: str):
        """Evaluate a JavaScript expression and return its value as from JSON. Raises RuntimeError if it throws."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{script}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def picture(self, path: Path, whole: bool = False) -> Path:
        """Save a PNG of the window, or of the whole page, to `path`."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))
        return path
