"""The pages: commands, those of the published README verbatim and those of this project's pages in the folders in which
they are shown; Python; links; and file names."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from matplotlib.patches import FancyBboxPatch
from published import ROOT, Copy

PUBLISHED = {
    "Prepare PE-Video Dataset": "python mani_data.py\n",
    "Training": """\
cd code/qwen-vl-finetune
export QWEN2_5_VL_VARIANT=origin   # origin / batch / group / gap / overlap / interleave
export QWEN2_5_VL_MODEL_PATH=Qwen/Qwen2.5-VL-7B-Instruct
export QWEN2_5_VL_TRAIN_DATA=../dataset/train_3_5.jsonl
bash scripts/sft.sh
""",
    "Evaluation": """\
export QWEN2_5_VL_VARIANT=origin
export QWEN2_5_VL_EVAL_MODEL_PATH=code/qwen-vl-finetune/output/qwen2_5vl-pe-origin
export QWEN2_5_VL_EVAL_DATA_DIR=dataset/test_3_5.jsonl
export QWEN2_5_VL_EVAL_IMG_ROOT=dataset/PE-Video/videos/test
bash eval.sh
""",
}
"""By its headings; "From project root:", it says before each."""


class Run(NamedTuple):
    """A command that is run."""

    says: str
    """Something that it writes."""
    more: str = ""
    """Flags that make it short."""


LAUNCHED = "with stand-ins for Python, srun and scontrol: it needs GPUs or machines, or is much like one that is run"
HELP = "with --help"
DEMO = "not: takes minutes, and tests/test_demo.py runs a short form"
MINUTES = "not: takes minutes on a GPU, and is the program of another command that is shown"
PAPER = "not: takes hours on GPUs; tests/test_paper.py runs a short form, and submits to a stand-in for SLURM"
CHECKS = "not: runs the tests"
OWN = "by tests/test_own_data.py, on data of its own"
OUTSIDE = "by tests/test_external.py, on data of its own"
SERVES = "not: serves until it is stopped, as tests/test_serve_ends.py does"
INSTALLS = "not: installs packages, as code/setup.sh does before the tests"
SMALL = " --min_pixels_per_frame 3136 --max_pixels_per_frame 3136 --dataloader_num_workers 0 --report_to none"
SHORT = " --max-new-tokens 12 --workers 0"
SLURM = "#!/bin/bash # SLURM: sbatch this from code/qwen-vl-finetune."

COMMANDS: dict[str, Run | str] = {
    "bash demo.sh": DEMO,
    "QWEN2_5_VL_VARIANT=all bash demo.sh": DEMO,
    "bash demo.sh --steps 4000 --output demo_output/long": DEMO,
    "QWEN2_5_VL_VARIANT=all bash demo.sh --steps 2200 --output demo_output/six": DEMO,
    "bash code/demo/quiet.sh": "not: as demo.sh with two trainings; tests/test_model_schedule.py runs its parts",
    "bash demo.sh --serve": DEMO,
    "QWEN2_5_VL_VARIANT=all bash demo.sh --serve": DEMO,
    "bash demo.sh --help": Run("all six, one after the other"),
    ".venv/bin/python code/demo/check.py --output demo_output": DEMO,
    "bash paper.sh": PAPER,
    "bash paper.sh --sizes 3B --tasks description --variants group gap": PAPER,
    "bash paper.sh --slurm jobs": PAPER,
    "bash paper.sh --demo": PAPER,
    "bash paper.sh --demo --jobs 12": PAPER,
    "bash paper.sh --report": PAPER,
    "bash paper.sh --plan --gpus 8xH100-80GB": Run("0 of 43 steps are done"),
    "bash paper.sh --status": Run("status: "),
    "bash test.sh": CHECKS,
    "bash test.sh tests/test_reference.py": CHECKS,
    "bash test.sh tests/test_model.py": CHECKS,
    "bash test.sh tests/test_positions.py": CHECKS,
    "bash test.sh tests/test_timeline.py": CHECKS,
    "SESSIONS=1000 bash test.sh tests/test_session.py tests/test_pipelined.py tests/test_session_pool.py": CHECKS,
    "python3 -m venv .venv && . .venv/bin/activate": INSTALLS,
    "pip install -r requirements.txt": INSTALLS,
    "pip install -e code/qwen-vl-utils": INSTALLS,
    "python -m qwen_vl_streaming.devices": Run(""),
    "python mani_data.py": Run("test: 2 samples, 2 rows"),
    "python mani_data.py --source /data/PE-Video --max-samples 20000": Run("train: 6 samples, 6 rows"),
    "python mani_data.py --dataset funqa": HELP,
    "python mani_data.py --help": HELP,
    "(cd code/qwen-vl-finetune && QWEN2_5_VL_TRAIN_DATA=dataset/funqa_train.jsonl bash scripts/sft.sh "
    "--output_dir output/qwen2_5vl-funqa-group)": LAUNCHED,
    "cd code/qwen-vl-finetune": Run(""),
    "QWEN2_5_VL_VARIANT=group QWEN2_5_VL_MODEL_PATH=Qwen/Qwen2.5-VL-3B-Instruct bash scripts/sft.sh": Run(
        "output/qwen2_5vl-pe-group   skipped samples: 0", SMALL
    ),
    "QWEN2_5_VL_MODEL_PATH=Qwen/Qwen2.5-VL-7B-Instruct bash scripts/sft.sh --output_dir output/qwen2_5vl-pe-group-7B": (
        LAUNCHED
    ),
    "QWEN2_5_VL_VARIANT=group bash scripts/sft.sh --schedule model --output_dir output/qwen2_5vl-pe-group-model": (
        LAUNCHED
    ),
    "QWEN2_5_VL_EVAL_MODEL_PATH=code/qwen-vl-finetune/output/qwen2_5vl-pe-group-7B bash eval.sh --output-file "
    "group_7B_infer.json": LAUNCHED,
    "python code/evaluation/load_elsewhere.py CHECKPOINT --python OTHER/bin/python": HELP,
    "bash scripts/sft.sh --help": Run("usage: bash scripts/sft.sh"),
    "python -m qwenvl.merge --adapter DIR --output DIR": HELP,
    "bash scripts/sft.sh": LAUNCHED,
    "bash scripts/sft.sh --plan --gpus 8xH100-80GB": Run("plan for 8 x H100"),
    "python -m qwenvl.planner.table": Run("| 8 x H100-80GB | 7B | full |"),
    "CUDA_VISIBLE_DEVICES=0,1 bash scripts/sft.sh": LAUNCHED,
    "NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash scripts/sft.sh": LAUNCHED,
    SLURM: LAUNCHED,
    "cd ../..": Run(""),
    "QWEN2_5_VL_VARIANT=group bash eval.sh": Run("qwen2_5vl-pe-group, trained as group on ", SHORT),
    "bash eval.sh": LAUNCHED,
    "NPROC_PER_NODE=2 bash eval.sh": LAUNCHED,
    "NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash eval.sh": LAUNCHED,
    "srun --nodes=2 --ntasks-per-node=1 --gpus-per-node=8 --cpus-per-task=64 bash eval.sh": LAUNCHED,
    "bash eval.sh --task funqa": LAUNCHED,
    "QWEN2_5_VL_VARIANT=gap bash eval.sh --schedule random --output-file gap_random_infer.json": LAUNCHED,
    "python code/evaluation/timeliness.py code/evaluation/output/*_infer.json --times TIMES.jsonl --picture "
    "said.png": Run("group wait-3 "),
    "python code/evaluation/timeliness.py demo_output/evaluation/*_infer.json --times "
    "demo_output/dataset/PE-Video/truth.jsonl": DEMO,
    "python code/evaluation/report.py code/evaluation/output/*_infer.json --output report": Run("page: report.html"),
    "python code/evaluation/verify.py FILE": Run(" of 2 videos are the arg-max of the stock model in float32, group"),
    "python -m qwen_vl_streaming.live --model MODEL --source film.mp4": Run(
        "live_output/", " --speed 100 --max-new-tokens 20 --device cpu"
    ),
    "python -m qwen_vl_streaming.live --help": HELP,
    "python -m qwen_vl_streaming.serve --model MODEL": SERVES,
    "python -m qwen_vl_streaming.serve --model MODEL --source hall=rtsp://user:password@camera/1 --source "
    "film=film.mp4": SERVES,
    'pip install -e "code/qwen-vl-utils[serve]"': INSTALLS,
    'pip install -e "code/qwen-vl-utils[serve,ray]"': INSTALLS,
    "code/benchmarks/serving.py load": HELP,
    "code/benchmarks/serving.py fuzz": HELP,
    "python -m qwen_vl_streaming.replay live_output/….json --model MODEL": Run(
        "replayed in float32: all the same", " --device cpu"
    ),
    "python code/demo/animate.py live_output/RECORD.json film.mp4 --output docs/speaking.gif": Run("speaking.gif: "),
    "python -m qwen_vl_streaming.explain": Run("group"),
    "python -m qwen_vl_streaming.explain --schedule 3,1,1,4": Run("a5–8"),
    "python -m qwen_vl_streaming.explain --format png --output docs/variants.png": Run(""),
    "python docs/draw_rooms.py": Run("files.md"),
    "python docs/draw_page.py demo_output film.mp4": "not: needs a browser and the trained models of the demo",
    "python -m basedpyright": "not: tests/test_types.py runs it",
    "code/benchmarks/latency.py long --size tiny --stream 10000 --window 20 100": HELP,
    "code/benchmarks/latency.py lanes": MINUTES,
    "code/benchmarks/latency.py sweep plot": MINUTES,
}
"""How each command of the pages is run here, or why it is not. One that is missing here fails the test."""

PAGES = (
    "README.md",
    *(f"docs/{name}.md" for name in ("data", "training", "evaluation", "paper", "live", "serving", "variants")),
    *(f"docs/{name}.md" for name in ("architecture", "files", "troubleshooting")),
    "CONTRIBUTING.md",
    "dataset/README.md",
)
"""In the order in which their commands are run; each begins in the project's root."""
WRITTEN = {
    "loss.png", "said.png", "report.png", "report.html", "report.md", "report-3B.html", "report-7B.html",
    "funqa_report.png", "train_3_5.jsonl", "train_3_5_report.png", "report/", "runs/", "PE-Video/", "FunQA/",
    "demo_output/", "paper_output/", "logs/", "dataset/", "3B/", "7B/", "output/", "live_output/", "serve_output/",
    "OTHER/bin/python", "records/",
}  # fmt: skip
"""Named in the pages, but made by programs or brought by users."""

COMMAND = re.compile(r"(\w+=\S+ )*(\(?cd|bash|(\.venv/bin/)?python3?|pip|srun|code/\S+\.py) .+", re.DOTALL)


def commands(text: str) -> Iterator[tuple[str, str, str]]:
    """(folder, command, input of a shell) for each command in `text`, a page: in its bash blocks and in its sentences.
    A block that begins with #! is one script; a cd applies until the next."""
    folder = ""
    for language, block, span in re.findall(r"^```(\w*)\n(.*?)^```|`([^`]+)`", text, re.DOTALL | re.MULTILINE):
        if block.startswith("#!"):
            yield folder, " ".join(block.split())[: len(SLURM)], block
            continue
        for line in block.splitlines() if language == "bash" else [" ".join(span.split())]:
            command = re.sub(r"(^|\s+)#.*", "", line)
            if COMMAND.fullmatch(command):
                yield folder, command, command
            if command.startswith("cd "):
                folder = os.path.normpath(os.path.join(folder, command.removeprefix("cd "))).removeprefix(".")


TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
OWN_DATA = TEXTS["docs/data.md"].partition("### Captions of your own")[2].partition("### Caption lengths")[0]
"""Its blocks are complete examples, all run by tests/test_own_data.py."""
BLOCKS = "\n".join(re.findall(r"^```bash\n.*?^```$", OWN_DATA, re.DOTALL | re.MULTILINE))
FROM_OUTSIDE = TEXTS["docs/evaluation.md"].partition("## Benchmarks from outside")[2].partition("\n## ")[0]
COMMANDS |= {command: OUTSIDE for _, command, _ in commands(FROM_OUTSIDE)}
COMMANDS |= {command: OWN for _, command, _ in commands(BLOCKS) if not command.startswith("cd ")}
MADE = "docs/files.md"
"""What docs/draw_rooms.py makes: the docstrings that it has are not commands to copy."""
SHOWN = list(dict.fromkeys(shown for page, text in TEXTS.items() if page != MADE for shown in commands(text)))
"""Each once, though several pages show it from the same folder."""


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(text: str) -> set[str]:
    """The anchors that GitHub creates for the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", without_code(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_links(page: str, text: str) -> list[str]:
    """The links of `text` to missing files or headings."""
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(text)):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name
        if not target.exists() or (anchor and anchor not in anchors(target.read_text("utf-8") if name else text)):
            dead.append(link)
    return dead


def missing_files(text: str, files: set[str]) -> set[str]:
    """The names of files and folders in code spans of `text` that match the end of no path in `files` and are not in
    WRITTEN."""
    ends = "py|sh|md|png|gif|toml|txt|css|html|js"
    named = {
        word
        for span in re.findall(r"`([^`\n]+)`", without_code(text))
        for word in re.findall(rf"(?<![\w./*<>…-])[\w.-][\w./-]*(?:\.(?:{ends})|/)(?![\w.*<…/-])", span)
    }
    folders = {f"{folder}/" for file in files for folder in map(str, Path(file).parents)}
    paths = [f"/{path}" for path in files | folders]
    return {word for word in named - WRITTEN if not any(path.endswith(f"/{word}") for path in paths)}


@pytest.fixture(scope="module")
def copy(made, tmp_path_factory):
    copy = Copy(tmp_path_factory.mktemp("copy"), made[0], made[1].parent / "videos")
    shutil.copytree(ROOT / "docs", copy.root / "docs")
    ids = [path.stem for path in (copy.root / "dataset/PE-Video/test").glob("*.json")]
    event = {"start": 0, "text": "A ring appears."}
    times = "".join(json.dumps({"video_id": video_id, "segments": [event]}) + "\n" for video_id in ids)
    (copy.root / "TIMES.jsonl").write_text(times)
    return copy


@pytest.mark.long
def test_the_published_commands_verbatim(copy):
    for script in PUBLISHED.values():
        done = copy.run(script)
        assert done.returncode == 0, done.stdout + done.stderr
    trained = copy.root / "code/qwen-vl-finetune/output/qwen2_5vl-pe-origin"
    rows = [json.loads(line) for line in (copy.root / "dataset/test_3_5.jsonl").read_text().splitlines()]
    captions = copy.root / "code/evaluation/output/origin_infer.json"
    said = [json.loads(line) for line in captions.read_text().splitlines()]
    assert [row["video_id"] for row in said] == [row["video_id"] for row in rows] and len(rows) == 2
    assert json.loads((captions.parent / "origin_scores.json").read_text())["skipped"] == 0
    assert json.loads((trained / "run.json").read_text())["data"]["left_out"] == []
    assert f"checkpoint {trained}, trained as origin on {copy.root / 'dataset/train_3_5.jsonl'}\n" in done.stderr


def test_every_command_of_the_pages_is_known():
    assert {command for _, command, _ in SHOWN} == COMMANDS.keys()


@pytest.mark.long
def test_commands_of_the_pages_run(copy, capsys):
    """In the order of the pages, so each command finds the files of those before it. Then the Python code."""
    trained = copy.root / "code/qwen-vl-finetune/output/qwen2_5vl-pe-group"
    for folder, command, _ in SHOWN:
        if not isinstance(way := COMMANDS[command], Run):
            continue
        film = next((copy.root / "dataset/PE-Video/videos/test").glob("*.mp4"))
        placeholders = {
            "/data/PE-Video": "dataset/PE-Video",
            "FILE": "code/evaluation/output/group_infer.json",
            "MODEL": str(trained),
            "film.mp4": str(film),
            "….json": "*.json",
            "RECORD.json": "*.json",
        }
        for word, stands_for in placeholders.items():
            command = re.sub(rf"(?<![\w]){re.escape(word)}(?!\w)", stands_for, command)
        done = copy.run(command + way.more, folder)
        assert done.returncode == 0, (folder, command, done.stdout + done.stderr)
        assert way.says in done.stdout + done.stderr, (command, done.stdout + done.stderr)
    names: dict = {}
    for block in python_blocks(TEXTS["README.md"]) + python_blocks(TEXTS["docs/variants.md"]):
        exec(block.replace('"MODEL"', repr(str(trained))).replace("film.mp4", str(film)), names)
    assert capsys.readouterr().out.startswith("  1.0 s ")
    session, answer = names["captioner"].session.caption(), names["answer"]
    many = len(answer.tokens)  # at most 300, where a session may write more
    assert many > 3 and (session.tokens[:many], session.slots[:many]) == (answer.tokens, answer.slots)


@pytest.mark.parametrize("folder, command", [shown[:2] for shown in SHOWN if COMMANDS.get(shown[1]) == HELP])
def test_slow_commands_have_help(copy, folder, command):
    done = copy.run(f"{'python ' if command.startswith('code/') else ''}{command} --help", folder)
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr


@pytest.mark.parametrize("folder, script", [shown[::2] for shown in SHOWN if COMMANDS.get(shown[1]) == LAUNCHED])
def test_commands_that_need_gpus_or_nodes_are_launched(tmp_path, folder, script):
    for path in [*ROOT.glob("*.sh"), *(ROOT / "code").rglob("*.sh")]:
        there = tmp_path / path.relative_to(ROOT)
        there.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, there)
    asked = "*qwenvl.planner | */processes.py*) echo 8 >&3"
    says = f'case "$1 $2" in -c*) echo 40123 ;; {asked} ;; *redact) shift 2; echo "+ $*" ;; esac'
    skips = 'while [ "${1#-}" != "$1" ]; do shift; done; exec "$@"'
    for name, does in (("python", says), ("srun", skips), ("scontrol", "exit 1")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-euc", script], cwd=tmp_path / folder, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("+ python "), done.stdout + done.stderr


def python_blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def test_scripts_that_are_not_run_exist():
    named = {word for command, way in COMMANDS.items() if way == CHECKS for word in re.findall(r"tests/\S+", command)}
    assert named and all((ROOT / name).is_file() for name in named)


def test_commands_are_found_in_their_folders():
    text = "`bash a.sh`, `a.py` and\n```bash\ncd code/b   # there\nX=1 bash c.sh --d\n\n# no\n```\nsay `python\ne.py`\n"
    text += "```bash\n#!/bin/bash\nsrun x\n```\n```\nbash output\n```\n```bash\ncd ..\n(cd b && bash f.sh)\n```\n`pip`"
    first, there, second, third, script, back, last = [(folder, command) for folder, command, _ in commands(text)]
    assert (first, there, second) == (("", "bash a.sh"), ("", "cd code/b"), ("code/b", "X=1 bash c.sh --d"))
    assert (third, script) == (("code/b", "python e.py"), ("code/b", "#!/bin/bash srun x"))
    assert (back, last) == (("code/b", "cd .."), ("code", "(cd b && bash f.sh)"))


def tracked() -> set[str]:
    """The project's files, as git tracks or would track them."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    return {name for name in files if name and (ROOT / name).exists()}


def test_every_page_is_read():
    assert {name for name in tracked() if re.fullmatch(r"docs/.*\.md|[^/]*\.md|dataset/.*\.md", name)} == {*PAGES}


def test_the_readme_fits_and_links_every_page():
    text = TEXTS["README.md"]
    assert text.count("\n") <= 200
    linked = set(re.findall(r"\]\(([\w/.]+)", text))
    assert {*PAGES} - linked == {"README.md", "dataset/README.md"}


@pytest.mark.parametrize("page", [*PAGES, "code/benchmarks/RESULTS.md"])
def test_links_have_targets(page):
    assert dead_links(page, (ROOT / page).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("page", PAGES)
def test_contents_name_every_section(page):
    """In the pages with a list of contents, in the order of the page."""
    text = without_code(TEXTS[page])
    sections = re.findall(r"^## (.+)$", text, re.MULTILINE)
    listed = re.findall(r"^- \[(.+?)\]\(#", text.partition("\n## ")[0], re.MULTILINE)
    assert listed == sections or not listed
    assert listed or len(sections) < 5 or page == MADE


@pytest.mark.parametrize("name", ["data", "training", "evaluation", "paper", "live", "serving"])
def test_pages_say_where_their_commands_run(name):
    start = " ".join(TEXTS[f"docs/{name}.md"].partition("\n## ")[0].split())
    assert "in the project's root, with `.venv` active (`. .venv/bin/activate`)." in start


@pytest.mark.parametrize("page", PAGES)
def test_named_files_exist(page):
    assert missing_files(TEXTS[page], tracked()) == set()


def test_dead_links_and_missing_files_are_found():
    text = (
        "# A *b* `c`, d\n[a](#a-b-c-d) [a](#b) [a](LICENSE) [a](no.md) [a](https://x.org/no)\n```\n# e\n[a](#f)\n```\n"
    )
    assert anchors(text) == {"a-b-c-d"} and dead_links("README.md", text) == ["#b", "no.md"]
    text = "`a/b.py`, `b.py --c d.md`, `code/a/`, `other/`, `<id>.md`, `*.png`, `x…py` and `loss.png`"
    assert missing_files(text, {"code/a/b.py"}) == {"d.md", "other/"}


def test_the_table_of_rooms_has_every_room():
    library = ROOT / "code/qwen-vl-utils/src/qwen_vl_streaming"
    rooms = {f"{path.parent.name}/" for path in library.glob("*/*.py")}
    listed = re.findall(r"^\| `([\w.]+/?)` \|", TEXTS["docs/architecture.md"].partition("## Rooms")[2], re.MULTILINE)
    assert rooms | {path.name for path in library.glob("[!_]*.py")} <= {*listed}


def test_the_pages_name_every_other_file():
    """Those that files.md does not list."""
    named = set(re.findall(r"[\w.*-]+", " ".join(TEXTS.values())))
    skipped = re.compile(r"tests/.*|.*\.(py|sh)|.*\.gitignore|docs/.*\.(png|gif)")
    assert {name for name in tracked() if not skipped.fullmatch(name) and Path(name).name not in named} == set()


def test_texts_of_the_figure_of_rooms_are_in_their_boxes(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    import draw_rooms

    figure = draw_rooms.draw(draw_rooms.read_rooms(), draw_rooms.read_programs(), tmp_path / "rooms.png")
    (axes,) = figure.axes
    boxes = [patch.get_window_extent() for patch in axes.patches if isinstance(patch, FancyBboxPatch)]
    texts = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) > 15 and len(texts) > 3 * len(boxes)
    for text in texts[2:]:  # after the title and the note
        assert any(box.x0 < text.x0 and text.x1 < box.x1 and box.y0 < text.y0 and text.y1 < box.y1 for box in boxes)
    assert all(text.count_overlaps(texts) == 1 for text in texts)  # itself
    assert all("…" not in text.get_text() for text in axes.texts)


def test_the_list_of_files_is_up_to_date(tmp_path):
    """The figure of the rooms is not compared: fonts and versions of matplotlib differ."""
    done = subprocess.run([sys.executable, "docs/draw_rooms.py", "--output", str(tmp_path)], cwd=ROOT)
    assert done.returncode == 0 and (tmp_path / "rooms.png").stat().st_size > 10_000
    assert (tmp_path / "files.md").read_text() == TEXTS[MADE], "run python docs/draw_rooms.py"
