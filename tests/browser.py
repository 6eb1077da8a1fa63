"""A real browser for tests: Chromium or Chrome, controlled through a pipe with the DevTools protocol. Requests to any
host but the one that a page was opened from are recorded as errors."""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from waiting import SECONDS

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


KEYS = {"Tab": 9, "Enter": 13, "Space": 32, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
CHARACTERS = {"Enter": "\r", "Space": " "}


class Browser:
    """Usage: `with Browser(folder) as page: page.open(path); page.run("1 + 1")`. `folder` is a new folder for the
    browser profile. `camera`: a file, MJPEG or Y4M, that plays as the camera, again and again; pages may use it."""

    def __init__(self, folder: Path, seconds: float = SECONDS, camera: Path | None = None):
        self.program, self.folder, self.seconds = find_browser(), folder, seconds
        fakes = ("--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream")
        self.flags = FLAGS if camera is None else (*FLAGS, *fakes, f"--use-file-for-fake-video-capture={camera}")
        self.site: str | None = None
        self.requests: list[str] = []
        """URLs that were asked for, of WebSockets too, but for file:, data: and blob:."""
        self.errors: list[str] = []
        """Errors and warnings of the console, uncaught exceptions, and requests to any other host."""

    def __enter__(self) -> "Browser":
        self._temporary = tempfile.mkdtemp(prefix="browser-")  # short: it holds a socket
        pipes = [fcntl.fcntl(end, fcntl.F_DUPFD, WIRES) for pair in (os.pipe(), os.pipe()) for end in pair]
        its_in, self._out, self._in, its_out = pipes
        command = [self.program, *self.flags, f"--user-data-dir={self.folder}", "about:blank"]
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{its_in} 4>&{its_out} {its_in}<&- {its_out}>&-', "bash", *command],
            pass_fds=(its_in, its_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "TMPDIR": self._temporary},
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
        shutil.rmtree(self._temporary, ignore_errors=True)  # its other processes may still be ending

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
        elif event == "Network.requestWillBeSent":
            self._note_request(params["request"]["url"])
        elif event == "Network.webSocketCreated":
            self._note_request(params["url"])

    def _note_request(self, url: str) -> None:
        if url.startswith(("file:", "data:", "blob:")):
            return
        self.requests.append(url)
        if self.site is None or urlsplit(url).netloc != self.site:
            self.errors.append(f"asked for {url}")

    def open(self, place: Path | str, width: int = 1200, height: int = 900, dark: bool = False) -> None:
        """Open a file or a URL, and wait until it is loaded. Requests to the host of the URL are no errors."""
        self.resize(width, height, dark)
        url = place if isinstance(place, str) else place.resolve().as_uri()
        self.site = urlsplit(url).netloc or None
        self._events.clear()
        self.call("Page.navigate", url=url)
        while "Page.loadEventFired" not in self._events:
            self._next()

    def resize(self, width: int, height: int, dark: bool = False) -> None:
        """A window of `width` x `height` CSS pixels on a device with a light or `dark` colour scheme."""
        mobile = width < 600
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if mobile else 1,
            mobile=mobile,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def run(self, script: str):
        """Evaluate a JavaScript expression and return its value as from JSON. Raises RuntimeError if it throws."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{script}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def wait(self, script: str, seconds: float = SECONDS):
        """Wait until a JavaScript expression is true, and return its value. Raises TimeoutError."""
        end = time.monotonic() + seconds
        while not (value := self.run(script)):
            if time.monotonic() > end:
                raise TimeoutError(f"not true within {seconds} s: {script}")
            time.sleep(0.03)
        return value

    def press(self, *keys: str) -> None:
        """Press keys one after the other: names in KEYS."""
        for key in keys:
            name = CHARACTERS.get(key, key) if key == "Space" else key
            told = {"key": name, "code": key, "windowsVirtualKeyCode": KEYS[key]}
            text = {"text": CHARACTERS[key]} if key in CHARACTERS else {}
            self.call("Input.dispatchKeyEvent", type="keyDown", **told, **text)
            self.call("Input.dispatchKeyEvent", type="keyUp", **told)

    def choose(self, selector: str, file: Path) -> None:
        """Choose `file` in a file input."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file.resolve())])

    def picture(self, path: Path, whole: bool = False) -> Path:
        """Save a PNG of the window, or of the whole page, to `path`."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))
        return path
