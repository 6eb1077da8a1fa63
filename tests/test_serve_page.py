"""The page of serve in a real browser, with a camera and files, against a small server that follows the protocol."""

import io
import json
import re

import numpy as np
import pytest
import torch
from browser import Browser
from media import make_video, picture, read_number
from PIL import Image
from qwen_vl_streaming.model.loading import load_config, load_model
from qwen_vl_streaming.model.prompts import load_processor
from qwen_vl_streaming.replay import replay, video_clips
from qwen_vl_streaming.sessions.record import read_record
from qwen_vl_streaming.video.clip_recorder import read_clips
from qwen_vl_streaming.video.frames import pick_frames, read_video, sampled_rate
from qwen_vl_streaming.video.index import index_video
from qwen_vl_streaming.video.pixel_budget import PixelBudget
from serve_stub import QUESTIONS, TOKENS, Stub
from served import running, trained
from waiting import until

SIZES = ((375, 812), (1920, 1080))
STATE = "document.body.dataset.state"
BEYOND = """[...document.querySelectorAll("body *")]
    .filter(each => !each.closest(".hidden, .symbols, .scroller") && each.checkVisibility()
        && each.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
    .map(each => each.outerHTML.slice(0, 80))"""
CONTRAST = """(() => {
    const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    const rgba = (colour) => {
        canvas.clearRect(0, 0, 1, 1);
        canvas.fillStyle = colour;
        canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data];
    };
    const light = (colour) => {
        const [r, g, b] = colour.map((part) => part / 255).map((part) =>
            part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const back = (each) => {
        for (; each; each = each.parentElement) {
            const colour = rgba(getComputedStyle(each).backgroundColor);
            if (colour[3] === 255) return colour;
        }
        return [255, 255, 255];
    };
    const faint = [];
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const each = walker.currentNode.parentElement;
        if (!walker.currentNode.textContent.trim() || !each.checkVisibility()) continue;
        if (each.closest(".hidden, :disabled, #screen .caption, template")) continue;
        const [one, two] = [light(rgba(getComputedStyle(each).color)), light(back(each))].sort((a, b) => b - a);
        const ratio = (one + 0.05) / (two + 0.05);
        if (ratio < 4.5) faint.push(`${ratio.toFixed(2)} ${each.outerHTML.slice(0, 100)}`);
    }
    return faint;
})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    camera = make_video(
        folder / "camera.mjpeg", seconds=10, size=(320, 192), codec="mjpeg", pixels="yuvj420p", container="mjpeg"
    )
    with Browser(folder / "profile", camera=camera) as page:
        yield page


@pytest.fixture
def page(browser):
    browser.errors.clear()
    browser.requests.clear()
    yield browser
    browser.call("Page.navigate", url="about:blank")


def open_page(page, server, *size) -> None:
    page.open(getattr(server, "url", None) or f"{server.http}/", *size)
    page.wait(f"{STATE} === 'ready'")


def choose_file(page, path) -> None:
    page.run("document.querySelector('[name=source][value=file]').click()")
    page.choose("#file", path)


def drop_file(page, path) -> None:
    choose_file(page, path)
    page.run("document.querySelector('[name=source][value=camera]').click()")
    page.run("""(() => {
        const dataTransfer = new DataTransfer();
        dataTransfer.items.add(document.getElementById("file").files[0]);
        dispatchEvent(new DragEvent("drop", { dataTransfer, cancelable: true }));
    })()""")


def press_action(page) -> None:
    page.run("document.getElementById('action').click()")


def look(page) -> None:
    """Nothing sticks out, and all text can be read, on phone and desktop, light and dark."""
    for width, height in SIZES:
        for dark in (False, True):
            page.resize(width, height, dark)
            # Not innerWidth: a phone zooms out until all fits.
            assert page.run("document.documentElement.scrollWidth") <= width, (width, page.run(BEYOND))
            assert page.run(BEYOND) == []
            assert page.run(CONTRAST) == [], (width, dark)


def test_it_speaks_while_the_camera_runs(page, tmp_path):
    """With the keyboard alone, and without a request to any other host."""
    with Stub(["group"]) as server:
        open_page(page, server)
        focused = []
        for _ in range(12):
            page.press("Tab")
            focused.append(page.run("document.activeElement.id || document.activeElement.value"))
            if focused[-1] == "action":
                break
        assert focused == ["camera", "question", "group", "schedule", "keep", "action"]
        page.run("document.getElementById('keep').focus()")
        page.press("Space")
        page.run("document.getElementById('question').focus()")
        page.press("ArrowUp")
        page.run("document.getElementById('action').focus()")
        page.press("Enter")
        page.wait(f"{STATE} === 'running'")
        assert page.run("document.getElementById('choices').disabled")
        page.wait("document.querySelectorAll('.token').length >= 9")
        start = " ".join(TOKENS).split()[:3]
        assert page.wait("document.getElementById('announcer').textContent || null").split()[:3] == start
        assert page.run("document.querySelector('#caption .newest').textContent").strip()
        page.wait("document.querySelector('.pace').textContent.includes('Keeps up')")
        assert page.run("document.activeElement.id") == "action"
        page.press("Enter")  # Stop
        page.wait(f"{STATE} === 'ended'")
        assert page.run("document.querySelector('.pace').textContent") == "Finished"
        assert page.run("document.querySelector('.record span').textContent") == "Record rec-group"
        buttons = page.run("[...document.querySelectorAll('.record button')].map(each => each.checkVisibility())")
        assert buttons == [True, True]
        page.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
        page.run("document.querySelector('.record button').click()")
        until((tmp_path / "rec-group.json").exists)
        assert json.loads((tmp_path / "rec-group.json").read_text()) == {"record": "rec-group"}
        written = page.run("[...document.querySelectorAll('.tokens')].map(each => each.textContent)")
        assert " ".join(" ".join(written).split()) == " ".join("".join(TOKENS).split())
        assert "<b>It</b>" in " ".join(written) and page.run("document.querySelectorAll('article b').length") == 0
        assert page.run("document.getElementById('video').srcObject") is None  # the camera is off
        look(page)
        (update,) = server.updates
        assert update["question"] == QUESTIONS[2] and update["models"] == ["group"] and update["schedule"] == "wait-3"
        assert update["keep"] is True
        assert update["source"] == {"kind": "client", "width": 320, "height": 192, "frames_per_second": 2}
        times = [moment for moment, _ in server.frames]
        assert times == [number / 2 for number in range(len(times))]
        assert Image.open(io.BytesIO(server.frames[0][1])).size == server.size
    assert page.errors == []
    assert len(page.requests) > 5 and all(request.split("//")[1].startswith("127.0.0.1") for request in page.requests)


def test_a_file_beside_three_models(page, tmp_path):
    """The frames are those that eval.sh samples; the columns show who keeps up."""
    times = [0.2 + number / 15 + (number % 7) / 120 for number in range(70)]  # a variable rate that starts late
    film = make_video(tmp_path / "film.mp4", times)
    index = index_video(film)
    picked = pick_frames(index.times, index.duration, 2.0, None, None)
    with Stub(["batch", "interleave", "group"], held=True) as server:
        open_page(page, server, 1920, 1080)
        look(page)
        page.resize(1920, 1080)
        drop_file(page, film)
        page.wait(f"{STATE} === 'behind'")
        assert page.run("document.getElementById('status-text').textContent") == "Cannot keep up: interleave"
        page.wait("document.querySelectorAll('[data-model=group] .token').length >= 12")
        tokens = page.run(
            "[...document.querySelectorAll('.column')].map(each => each.querySelectorAll('.token').length)"
        )
        assert tokens[0] == 0 < tokens[1] < tokens[2]
        paces = page.run("[...document.querySelectorAll('.pace')].map(each => each.textContent)")
        assert paces[0] == "Silent until the end" and re.fullmatch(r"\d s behind", paces[1]) and paces[2] == "Keeps up"
        follows = (
            "[...document.querySelectorAll('.scroller')].every(m => m.scrollHeight - m.clientHeight - m.scrollTop < 2)"
        )
        page.resize(375, 812)
        server.held = False
        page.wait(f"{STATE} === 'ended'")
        assert page.run(follows)  # the newest second is in view, though the window has shrunk
        look(page)
        size = {"width": 160, "height": 96, "frames": len(picked), "frames_per_second": 2}
        assert server.updates[0]["source"] == {"kind": "client", **size}
        assert [moment for moment, _ in server.frames] == [number / 2 for number in range(len(picked))]
        numbers = [read_number(np.asarray(Image.open(io.BytesIO(jpeg)))) for _, jpeg in server.frames]
        assert numbers == picked.tolist()
        assert page.run("document.querySelectorAll('[data-model=batch] .over, [data-model=batch] .after').length") >= 1
    assert page.errors == []


def test_with_a_real_server(page, made, tmp_path):
    """A file gives clips of the times and sizes of eval.sh, and the page shows the tokens of a record that replays."""
    names = ("group", "origin")
    checkpoints = {name: trained(made[0], tmp_path / name, name) for name in names}
    models = [flag for name in names for flag in ("--model", f"{name}={checkpoints[name]}")]
    film = make_video(tmp_path / "film.mp4", seconds=3.4, size=(168, 112))
    with running([*models, "--records", str(tmp_path / "records"), "--max-new-tokens", "12"]) as server:
        open_page(page, server)
        page.run("document.getElementById('keep').click()")
        choose_file(page, film)
        press_action(page)
        page.wait(f"{STATE} === 'ended'")
        assert page.run("document.getElementById('alert').textContent") == ""
        assert page.run("[...document.querySelectorAll('.pace')].map(each => each.textContent)") == ["Finished"] * 2
        page.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
        for name in names:
            article = f"document.querySelector('[data-model={name}]')"
            (key,) = re.findall(r"Record (\S+)", page.run(f"{article}.querySelector('.record span').textContent"))
            record = read_record(server.record(key))
            processor = load_processor(checkpoints[name])
            text = processor.tokenizer.decode(record.tokens, skip_special_tokens=True)
            shown = page.run(f"[...{article}.querySelectorAll('.tokens')].map(each => each.textContent)")
            assert "".join("".join(shown).split()) == "".join(text.split())

            page.run(f"{article}.querySelectorAll('.record button')[1].click()")
            kept = tmp_path / f"{key}.clips.safetensors"
            until(kept.exists)
            video = read_video(film, budget=PixelBudget.trained(load_config(str(checkpoints[name]))))
            frames = read_clips(kept)
            assert frames.shape == video.frames.shape
            assert (frames.float() - video.frames.float()).abs().mean() < 2  # as JPEG, and as browsers resize
            model = load_model(str(checkpoints[name]), "sdpa", torch.float32).eval()
            assert all(each.tie for each in replay(record, model, video_clips(record, processor, kept=kept)))
    assert page.errors == []


FILMS = {
    "steady.mp4": {"seconds": 3.0, "fps": 25},
    "reordered.mp4": {"seconds": 2.6, "fps": 30, "options": {"bf": "3", "b-pyramid": "normal"}, "keyframe_every": 90},
    "slow.mp4": {"seconds": 6.0, "fps": 0.8},
    "vp9.webm": {
        "seconds": 2.5,
        "fps": 12,
        "codec": "libvpx-vp9",
        "options": {"deadline": "realtime", "cpu-used": "8"},
    },
    "variable.mov": {"times": [number / 10 + (number % 3) / 60 for number in range(28)]},
    "recorded.webm": {"seconds": 2.2, "fps": 10, "codec": "libvpx", "options": {"deadline": "realtime"}},
}


class Pipe:
    """Where a recording is written that cannot be completed afterwards: its header lacks the length."""

    def __init__(self):
        self.data = b""

    def write(self, data: bytes) -> int:
        self.data += data
        return len(data)


@pytest.mark.parametrize("name", FILMS)
def test_frames_of_a_file(page, tmp_path, name):
    """The times, and the frames on screen at these times, are those that eval.sh samples."""
    film = tmp_path / name
    if name.startswith("recorded"):
        film.write_bytes(make_video(Pipe(), container="webm", **FILMS[name]).data)
    else:
        make_video(film, **FILMS[name])
    index = index_video(film)
    rate = sampled_rate(index, 2.0)
    picked = pick_frames(index.times, index.duration, rate, None, None)
    with Stub(["group"]) as server:
        open_page(page, server)
        choose_file(page, film)
        sampled = """
            const film = new m.Film(document.getElementById("video"), 2, document.getElementById("file").files[0]);
            const about = await film.open();
            film.started = -1e6; // all frames are due
            const canvas = new OffscreenCanvas(160, 96), rows = [];
            const context = canvas.getContext("2d", { willReadFrequently: true });
            for (let k = 0; ; k++) {
                const shown = await film.frame(k / film.fps);
                if (!shown) break;
                context.drawImage(shown, 0, 0);
                rows.push([...context.getImageData(0, 48, 160, 1).data]);
            }
            film.close();
            return [about, rows]"""
        about, rows = module(page, "sources.js", sampled)
    rate_of_page = about.pop("frames_per_second")
    assert about == {"kind": "client", "width": 160, "height": 96, "frames": len(picked)}
    assert rate_of_page == pytest.approx(rate, rel=1e-5)
    numbers = [read_number(np.array(row, dtype=np.uint8).reshape(1, 160, 4)[:, :, :3]) for row in rows]
    assert numbers == picked.tolist()
    assert page.errors == []


WHERE_SOUGHT = "Math.max(mediaTime, this.currentTime)"
LATER = "this.currentTime + (this.currentTime > 0.9 && this.currentTime < 1.5 ? 0.2 : -0.01)"
OTHER_BROWSER = """
    const ask = HTMLVideoElement.prototype.requestVideoFrameCallback;
    HTMLVideoElement.prototype.requestVideoFrameCallback = function (then) {
        return ask.call(this, (now, { mediaTime, presentedFrames }) =>
            then(now, { mediaTime: this.paused ? SAID : mediaTime, presentedFrames }));
    };
    const open = async () => {
        const film = new m.Film(document.getElementById("video"), 2, document.getElementById("file").files[0]);
        let hidden = true; // nothing is measured in the background
        Object.defineProperty(document, "hidden", { get: () => hidden, configurable: true });
        setTimeout(() => (hidden = false), 300);
        film._measure = () => (hidden ? film.close() : m.Film.prototype._measure.call(film));
        try {
            const { frames, frames_per_second } = await film.open();
            film.started = -1e6;
            await film.frame(1);
            return [frames, frames_per_second];
        } catch (error) {
            return error.message;
        } finally {
            film.close();
            HTMLVideoElement.prototype.requestVideoFrameCallback = ask;
        }
    };
    return [await open(), document.querySelectorAll("video").length]"""


@pytest.mark.parametrize(
    "made, said, found",
    [
        ({"seconds": 3.04, "fps": 25}, WHERE_SOUGHT, [7, 2]),
        ({"seconds": 2.7, "fps": 1.5}, WHERE_SOUGHT, [4, 1.5]),
        ({"seconds": 2.0}, LATER, "skips"),
    ],
)
def test_frames_of_a_file_in_firefox(page, tmp_path, made, said, found):
    """Firefox says of a sought frame where it was sought, and skips frames of some WebMs: here Chromium does."""
    film = make_video(tmp_path / "film.mp4", **made)
    with Stub(["group"]) as server:
        open_page(page, server)
        choose_file(page, film)
        got, players = module(page, "sources.js", OTHER_BROWSER.replace("SAID", said))
    assert players == 1
    if found == "skips":
        assert "this browser skips frames of film.mp4" in got, got
    else:
        assert got == pytest.approx(found, rel=1e-5)


def test_a_camera_that_stands_still(page):
    with Stub(["group"]) as server:
        open_page(page, server)
        page.run("window.read = CanvasRenderingContext2D.prototype.getImageData")
        page.run("CanvasRenderingContext2D.prototype.getImageData = () => ({ data: new Uint8ClampedArray(64) })")
        press_action(page)
        page.wait("document.getElementById('alert').textContent.startsWith('This browser hides pictures')")
        page.run("CanvasRenderingContext2D.prototype.getImageData = read")
        press_action(page)
        page.wait(f"{STATE} === 'running'")
        page.run("document.getElementById('video').pause()")
        page.wait("!document.getElementById('video').paused")
        page.run("""Object.defineProperty(video.srcObject.getVideoTracks()[0], "muted", { value: true })""")
        page.wait("document.getElementById('status-text').textContent.startsWith('The picture stands still')")
        page.run("dispatchEvent(new PageTransitionEvent('pagehide', { persisted: true }))")  # it may be shown again
        assert page.run(f"[{STATE}, document.getElementById('video').srcObject]") == ["lost", None]
        page.run("document.body.dataset.state = 'connecting'")
        page.run("dispatchEvent(new PageTransitionEvent('pageshow', { persisted: true }))")
        page.wait(f"{STATE} === 'ready'")
    assert page.errors == []


def test_states(page, tmp_path):
    bad = tmp_path / "bad.mp4"
    bad.write_text("no video")
    alert = "document.getElementById('alert').textContent"
    action = "document.getElementById('action').textContent"
    with Stub(["group"], places=3, vanish_after=2) as server:
        open_page(page, server)
        choose_file(page, bad)
        press_action(page)
        assert page.wait(alert).startswith("This browser cannot play bad.mp4.")
        assert page.run(STATE) == "ready"
        page.run("document.querySelector('[name=source][value=camera]').click()")
        press_action(page)
        waiting = "document.getElementById('status-text').textContent === 'Waiting for a place: you are number {}'"
        for place in (3, 2, 1):
            page.wait(waiting.format(place))
            server.leave()
        page.wait(f"{STATE} === 'lost'")
        assert page.run(action) == "Reconnect" and "cannot be continued" in page.run(alert)
        assert page.run("document.querySelector('.record span').textContent") == "Record r-group"
        look(page)
        server.places = 1
        press_action(page)
        page.wait(f"{STATE} === 'queued'")
        assert page.run(alert) == ""
        server.leave()
        page.wait(f"{STATE} === 'running'")
    page.wait(f"{STATE} === 'lost'")
    page.errors.clear()
    press_action(page)
    page.wait(f"{STATE} === 'lost'")
    assert page.run(alert) == "The server does not answer."
    assert all("ERR_CONNECTION_REFUSED" in error for error in page.errors)


def test_stop_and_stop_now(page):
    """The first press ends the video, and the answer is finished; the second ends the answer."""
    with Stub(["interleave"], held=True) as server:
        open_page(page, server)
        page.run("document.getElementById('question').value = 'own'")
        page.run("document.getElementById('own-question').value = 'q'.repeat(500)")
        press_action(page)
        page.wait("document.querySelectorAll('.token').length >= 1")
        press_action(page)
        assert page.run(f"[{STATE}, document.getElementById('action').textContent]") == ["finishing", "Stop now"]
        assert page.run("[video.srcObject, remote.hidden]") == [None, False]  # the camera is off
        press_action(page)
        page.wait(f"{STATE} === 'ended'")
        assert page.run("document.querySelector('.pace').textContent") == "Stopped"
        look(page)
    assert page.errors == []


def test_a_page_that_waits_connects_again(page):
    """The server closes connections on which nothing comes; the page says nothing, and start makes a new one."""
    with Stub(["group"], idle=0.3) as server:
        open_page(page, server)
        until(lambda: server.closed)
        server.idle = None
        assert page.run(f"[{STATE}, document.getElementById('alert').textContent]") == ["ready", ""]
        press_action(page)
        page.wait("document.querySelectorAll('.token').length >= 1")
    assert sum(request.startswith("ws:") for request in page.requests) == 2


def test_a_session_that_is_refused(page):
    with Stub(["group"], refusal="32 viewers wait already: come back later") as server:
        open_page(page, server)
        press_action(page)
        assert page.wait("document.getElementById('alert').textContent") == server.refusal
        assert page.run(STATE) == "ready" and page.run("document.getElementById('video').srcObject") is None
    assert page.errors == []


def test_a_source_of_the_server(page):
    frames = []
    for number in range(1, 7):
        buffer = io.BytesIO()
        Image.fromarray(picture(number)).save(buffer, "jpeg", quality=95)
        frames.append(buffer.getvalue())
    with Stub(["group"], source=frames) as server:
        open_page(page, server)
        page.run("document.querySelector('[value=\"server:door\"]').click()")
        page.run(f"""window.states = []; new MutationObserver(() => states.push({STATE}))
            .observe(document.body, {{ attributes: true, attributeFilter: ["data-state"] }})""")
        press_action(page)
        page.wait("document.querySelectorAll('.token').length >= 3")
        assert page.run("[remote.width, remote.height, remote.hidden, video.hidden]") == [160, 96, False, True]
        page.wait(f"{STATE} === 'ended'")
        assert page.run("states")[-3:] == ["running", "finishing", "ended"]
        assert server.updates[0]["source"] == {"kind": "server", "name": "door"} and server.frames == []
        page.run("document.getElementById('question').value = 'own'")
        page.run("document.getElementById('question').dispatchEvent(new Event('change'))")
        page.run("document.getElementById('own-question').value = ' Who is there? '")
        press_action(page)
        page.wait(f"{STATE} === 'running'")
        assert server.updates[1] == {**server.updates[0], "question": "Who is there?"}
        page.wait(f"{STATE} === 'ended'")
        seconds = """[...document.querySelectorAll(".thumbnail")].map((each) =>
            each.width && [...each.getContext("2d").getImageData(90, 20, 1, 1).data])"""
        assert page.run(seconds)[:3] == [[0, 0, 0, 255]] * 3  # drawn, and opaque
    assert page.errors == []


def module(page, name: str, body: str):
    """What `body`, JavaScript with the module `m`, returns."""
    return page.run(f"import('/static/{name}').then(async (m) => {{ {body} }})")


def test_modules(page):
    values = [0.3, 0.1, 0.7, 0.2, 5.0]
    with Stub(["group"]) as server:
        open_page(page, server)
        found = module(page, "gauges.js", f"return [0.5, 0.95].map(part => m.percentile({values}, part))")
        assert found == pytest.approx(np.percentile(values, (50, 95)).tolist())
        ages = """
            const gauges = new m.Gauges();
            for (let i = 0; i < 5000; i++) gauges.add(i / 3, i < 4998 ? 0.2 : 9, i > 4997);
            const behind = [[10, 2], [12.9, 1], [13.1, 0]].map(([now, waiting]) => {
                gauges.waiting = waiting;
                gauges.judge(now);
                return gauges.behind;
            });
            return [gauges.ages.length, gauges.times.length < 40, gauges.age.p95, gauges.tokens, behind]"""
        assert module(page, "gauges.js", ages) == [1000, True, 0.2, 5000, [True, True, False]]

        text = "It is 3.5 m. “It ends.” Then 視頻。圓圈。 And <b>"
        said = f"""
            const caption = new m.Caption(), done = [];
            for (const part of {json.dumps(list(text))}) done.push(...caption.add(part));
            for (let i = 0; i < 1000; i++) caption.add("word ");
            const long = [m.ending("word ".repeat(90)).length, m.ending("語".repeat(300))];
            return [done, caption.text.length < 2100, ...long]"""
        sentences = ["It is 3.5 m.", "“It ends.”", "Then 視頻。", "圓圈。"]
        assert module(page, "captions.js", said) == [sentences, True, 161, "… " + "語" * 160]

        late = """
            const about = { announce() {}, secondsPerClip: 1 };
            const column = new m.Column(document.getElementById("column"), { name: "x", variant: "group" }, about);
            const token = { delta: " a", token_ids: [1], age_ms: 5 };
            column.token({ ...token, capture_time: 1.5 }, 2, null);
            column.token({ ...token, capture_time: 1.5 }, 9, 2); // of the last clip but one
            column.token({ ...token, capture_time: 2 }, 99, 2);
            return column.gauges.ages"""
        assert module(page, "column.js", late) == [0.5, 7.5]

        folded = """
            const list = document.querySelector(".timeline"), line = new m.Timeline(list, 10);
            for (let i = 0; i < 400; i++) line.write(` ${i}`, i + 0.5, i % 2);
            line.write(" much later", 1e6, 0);
            const [summary, text] = list.querySelector("details").children;
            return [list.children.length, summary.textContent, text.textContent.endsWith(" 398 399"),
                    text.textContent.length < 2100, m.clock(59.9), m.clock(61), m.clock(3725)]"""
        assert module(page, "timeline.js", folded) == [11, "Up to 6:40", True, True, "59 s", "1:01", "1:02:05"]

        dropping = """
            const video = document.createElement("canvas");
            video.videoWidth = video.width = 64, video.videoHeight = video.height = 48;
            const sent = [], connection = { unsent: 0, sendFrame: (time) => sent.push(time) };
            const source = { fps: 2, latest: 2, now: () => 0, frame: async (time) => time < 4 ? video : null };
            const sampler = new m.Sampler(source, connection, { width: 56, height: 28 },
                (canvas, time) => (connection.unsent = time === 1 || time === 1.5 ? 1e7 : 0));
            HTMLCanvasElement.prototype.toBlob = null; // it takes a second in the background
            await sampler.run();
            const live = { ...source, latest: 0.4, now: () => 1.7 }, taken = [];
            await new m.Sampler(live, connection, { width: 56, height: 28 }, (canvas, time) => taken.push(time)).run();
            return [sent.slice(0, 6), sampler.dropped, taken]"""
        assert module(page, "sampler.js", dropping) == [[0, 0.5, 2, 2.5, 3, 3.5], 2, [0, 1.5, 2, 2.5, 3, 3.5]]
    assert page.errors == []


def test_a_browser_that_cannot_make_pictures_says_so(page, tmp_path):
    """An error in the worker that makes them would not reach the page by itself."""
    film = make_video(tmp_path / "a.mp4", seconds=3.0, fps=25)
    with Stub(["group"]) as server:
        open_page(page, server)
        choose_file(page, film)
        page.run("""(() => {
            const post = Worker.prototype.postMessage;
            Worker.prototype.postMessage = function (message, handed = []) {
                return post.call(this, message.picture ? { ...message, picture: null } : message, handed);
            };
        })()""")
        press_action(page)
        page.wait(f"{STATE} === 'ended'")
        assert "The video stopped: " in page.run("document.getElementById('alert').textContent")
