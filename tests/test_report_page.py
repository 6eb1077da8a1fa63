"""The page of the report: its content cannot break it, and it works in a real browser."""

import json
import re
from html.parser import HTMLParser

import pytest
from browser import Browser
from qwen_vl_streaming.timeline.variants import VARIANTS
from result_files import METRICS, World

ODD = (
    "The video shows a naïve 🙂 👩‍👩‍👧 and \u202eנכתב\u202c here. It ends.",
    "يظهر الفيديو دائرة حمراء على اليسار. ثم تختفي.",
    "<script>window.hacked = 1</script> & <img src=x onerror='window.hacked = 2'> \"it\" turns `pink` | *blue*.",
    "視頻顯示一個紅色圓圈。\n然後它離開了。",
    "The video shows a red ring on the left. It turns pink. " * 4,
)


@pytest.fixture
def world(made, tmp_path):
    return World(tmp_path / "results", *made)


def test_the_page_is_one_file_that_escapes_what_it_shows(world):
    odd_id = '"><b id=x>\u2028'
    world.videos[0]["video_id"] = odd_id
    world.clips[odd_id] = next(iter(world.clips.values()))
    data = world.folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in world.videos))
    world.data = data
    world.videos[1]["human_caption"] = "a lone \ud83d half"
    world.add("group", captions=[ODD[2], "a red ring"])
    page, _ = world.report(*world.files)

    found = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            found.append((tag, dict(attributes)))

    Reader().feed(page)
    assert sum(tag == "script" for tag, _ in found) == 1 and not any(tag in ("b", "link", "iframe") for tag, _ in found)
    sources = [attributes["src"] for _, attributes in found if "src" in attributes]
    assert sources and all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert not any(name.startswith("on") or name == "href" for _, attributes in found for name in attributes)
    assert "http" not in re.sub(r"<meta http-equiv", "", page)


def spoken(world, row: dict, slot: int) -> str:
    """The text that a row had written by the end of a slot, without white space."""
    written = [token for token, when in zip(row["tokens"], row["slots"], strict=True) if when <= slot]
    text = world.tokenizer.decode(written, skip_special_tokens=True).rstrip("\ufffd")
    return " ".join(text.split())


def test_in_a_real_browser(world, tmp_path):
    values = {}
    for number, (variant, rule) in enumerate(VARIANTS.items()):
        for schedule in ("wait-3", "random-3")[: 1 + rule.streams]:
            captions = [ODD[(number + shift) % len(ODD)] for shift in range(3)]
            values[variant, schedule] = world.add(variant, schedule, captions=captions)
    points = [(0, 2), (0, 2), (3, 5), (3.5, None), (4, 3), (30, 31)]
    rows = [{"video_id": "v", "event": "x", "time": time, "said": said} for time, said in points]
    (world.folder / "gap_wait-3_timeliness.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores = json.loads((world.folder / "gap_wait-3_scores.json").read_text())
    scores["timeliness"] = {"events": 6, "videos": 1, "delay_median": 2.0, "delay_95": 2.0, "TF1": 12.5, "never": 16.7}
    (world.folder / "gap_wait-3_scores.json").write_text(json.dumps(scores))
    with Browser(tmp_path / "profile") as page:
        world.report(*world.files)
        page.open(world.page)

        for (variant, schedule), scores in values.items():
            cells = page.run(
                f"""[...document.querySelectorAll("table.numbers")[0].rows]
                .filter(row => row.dataset.row?.startsWith("{VARIANTS[variant].paper.replace(", ", "|")}|ours"))
                .map(row => [...row.querySelectorAll("td")].map(cell => cell.textContent))"""
            )
            (row,) = [row for row in cells if ("random-3" in row[0]) == (schedule == "random-3")]
            assert row[1:] == [*(f"{scores[metric]:.2f}" for metric in METRICS), "-1", "-1"]
        bars = page.run("[...document.querySelectorAll('.bar.fixed title')].map(bar => bar.textContent)")
        meteor = f"{values['batch', 'wait-3']['METEOR']:.2f}"
        assert any(bar.startswith("batch") and bar.endswith(meteor) for bar in bars)

        drawn = page.run(
            """[...document.querySelectorAll("figure svg circle")].map(circle => {
                const [mine, whole] = [circle, circle.ownerSVGElement].map(each => each.getBoundingClientRect());
                const inside = mine.left >= whole.left && mine.right <= whole.right && mine.top >= whole.top;
                return [circle.textContent, circle.getAttribute("class"), inside && mine.bottom <= whole.bottom];
            })"""
        )
        kinds = {text: kind for text, kind, _ in drawn}
        assert len(drawn) == 5 and all(inside for *_, inside in drawn)
        assert kinds["2 events at 0 s, said at 2 s"] == "named" and kinds["1 event at 4 s, said at 3 s"] == "early"
        assert kinds["1 event at 3.5 s, never named"] == "never"

        assert page.run("document.querySelectorAll('.story').length") == 3
        labels = page.run(
            "[...document.querySelectorAll('.story')[1].querySelectorAll('.who')].map(who => who.innerText)"
        )
        files = [f"{variant}_{schedule}_infer.json" for variant, schedule in values]
        rows = [json.loads((world.folder / name).read_text().splitlines()[1]) for name in files]
        assert len(labels) == len(rows)
        start = "[...document.querySelectorAll('.story')].map(each => each.querySelector('input').value)"
        assert page.run(start) == ["1"] * 3  # each video starts at its beginning
        frames = set()
        for slot in range(1, rows[0]["clips"] + 1):
            shown = page.run(
                f"""(() => {{
                const story = document.querySelectorAll(".story")[1], slider = story.querySelector("input");
                slider.value = {slot};
                slider.dispatchEvent(new Event("input"));
                return {{
                    said: [...story.querySelectorAll(".text p")].map(each => each.innerText),
                    added: [...story.querySelectorAll(".text p")].map(
                        each => [...each.querySelectorAll(".new")].map(word => word.innerText).join("")),
                    nothing: [...story.querySelectorAll(".nothing")].map(each => each.checkVisibility()),
                    frame: story.querySelector(".big").src,
                    strip: story.querySelector("th.now img").src,
                    time: story.querySelector("output").textContent,
                }}; }})()"""
            )
            assert shown["frame"] == shown["strip"] and shown["time"].startswith(f"{slot} s of ")
            frames.add(shown["frame"])
            for row, said, added, nothing in zip(rows, shown["said"], shown["added"], shown["nothing"], strict=True):
                now, earlier = spoken(world, row, slot), spoken(world, row, slot - 1)
                assert " ".join(said.split()) == now and nothing == (now == "")
                assert " ".join(added.split()) == now.removeprefix(earlier).strip()

        assert len(frames) > 1

        ticked = page.run(
            """(() => {
            const story = document.querySelector(".story"), slider = story.querySelector("input"), seen = [];
            let tick = null;
            window.setInterval = (step) => { tick = step; return 1; };
            slider.value = 1;
            story.querySelector(".play").click();
            while (story.querySelector(".play.on")) { tick(); seen.push(Number(slider.value)); }
            return seen; })()"""
        )
        assert ticked == list(range(2, next(iter(world.clips.values())) + 1))

        for width in (1200, 375):
            page.open(world.page, width, 800)
            assert page.run("document.documentElement.scrollWidth <= window.innerWidth")
            beyond = page.run(
                """[...document.querySelectorAll("body *")]
                .filter(each => !each.closest(".wide, svg") && each.getBoundingClientRect().right > innerWidth + 1)
                .map(each => each.outerHTML.slice(0, 80))"""
            )
            assert beyond == []
            assert page.run("[...document.images].every(each => each.loading === 'lazy' || each.naturalWidth > 0)")
        assert page.run("window.hacked") is None
        assert page.errors == []
