"""Draws the rooms of the library and who imports whom (rooms.png), and lists every file with what it is for (files.md).

    python docs/draw_rooms.py

Both come from the source: imports as they are written, and the first sentence of each docstring.
"""

import argparse
import ast
import re
from collections.abc import Iterator
from pathlib import Path

from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

DOCS = Path(__file__).resolve().parent
CODE = DOCS.parent / "code"
LIBRARY = "qwen-vl-utils/src/qwen_vl_streaming"
TITLES = {
    LIBRARY: "The library",
    "data": "Data",
    "qwen-vl-finetune/qwenvl": "Training",
    "evaluation": "Evaluation",
    "paper": "The paper",
    "demo": "The demo",
    "benchmarks": "Benchmarks",
}
"""Folders below code/ in the order of files.md; those that are not named here follow."""
INK, GREY, BLUE, PALE = "#222222", "#8C8C8C", "#0072B2", "#EAF3F9"
WIDE = 11.5  # inches
DPI = 110
BOX = (2.52, 1.1)  # width and height of a room: a title, three lines that say what it is, two at its foot
STEP = 1.38  # from one floor to the next
BASE = "common"
"""The room that all import; no arrows lead to it."""
NOTE = (
    "An arrow means: imports. Imports that a path of arrows implies are listed but not drawn. Everything may import "
    f"{BASE}; the library imports no program."
)


def docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def first_sentence(text: str) -> str:
    """The first sentence of the first paragraph, without what follows a colon at its end."""
    paragraph = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<=[.?])\s+(?=[A-Z])", paragraph)[0].rstrip(":")


def purpose(path: Path) -> str:
    """What a Python or shell file says that it is for."""
    if path.suffix == ".py":
        return first_sentence(docstring(path))
    comments = [line[1:].strip() for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    return first_sentence(" ".join(comments[1:] if comments[0].startswith("!") else comments))


def room_of(path: Path) -> str:
    """The room of a file of the library: a folder or, at the top, the file itself."""
    return path.relative_to(CODE / LIBRARY).with_suffix("").parts[0]


def imported(path: Path) -> Iterator[str]:
    """The rooms that a file of the library imports, by relative imports."""
    package = path.relative_to(CODE / LIBRARY).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            module = node.module.split(".") if node.module else [name.name for name in node.names]
            yield from [base[0]] if base else module[:1] if node.module else module


def read_rooms() -> dict[str, set[str]]:
    """Of each room of the library, the others that it imports."""
    rooms: dict[str, set[str]] = {}
    for path in sorted((CODE / LIBRARY).rglob("*.py")):
        if (room := room_of(path)) != "__init__":
            rooms.setdefault(room, set()).update(imported(path))
    return {room: others - {room} for room, others in rooms.items()}


def floors(rooms: dict[str, set[str]]) -> dict[str, int]:
    """The floor of each room: one above the highest that it imports. Raises ValueError for a circle of imports."""
    floor: dict[str, int] = {}
    while len(floor) < len(rooms):
        ready = {room for room, others in rooms.items() if room not in floor and others <= floor.keys()}
        if not ready:
            raise ValueError(f"these rooms import each other: {', '.join(sorted(rooms.keys() - floor.keys()))}")
        floor |= {room: 1 + max((floor[other] for other in rooms[room]), default=0) for room in ready}
    return floor


def reached(rooms: dict[str, set[str]], room: str) -> set[str]:
    """What `room` imports, directly or through others."""
    return rooms[room].union(*(reached(rooms, other) for other in rooms[room]))


def drawn(rooms: dict[str, set[str]]) -> list[tuple[str, str]]:
    """The arrows that no other path of arrows implies."""
    return [
        (room, other)
        for room, others in rooms.items()
        for other in sorted(others)
        if not any(other in reached(rooms, between) for between in others - {other})
    ]


def places(rooms: dict[str, set[str]]) -> dict[str, tuple[int, int]]:
    """The floor and the column of each room. One that others import stands just below the lowest of them, in the
    first column where it is on the longest path of imports."""
    floor = floors(rooms)
    users = {room: [other for other in rooms if room in rooms[other]] for room in rooms}
    high = {room: min((floor[other] - 1 for other in users[room]), default=floor[room]) for room in rooms}
    place, taken = {}, {}
    for room in sorted(rooms, key=lambda room: (high[room], floor[room] < high[room], -len(users[room]), room)):
        taken[high[room]] = column = taken.get(high[room], -1) + 1
        place[room] = (high[room], column)
    return place


def read_programs() -> dict[str, tuple[str, set[str]]]:
    """Of each program: where it is, and the rooms of the library that it imports."""
    programs: dict[str, tuple[str, set[str]]] = {}
    for path in [DOCS.parent / "mani_data.py", *sorted(CODE.rglob("*.py"))]:
        if (CODE / LIBRARY) in path.parents:
            continue
        folder = next((folder for folder in TITLES if CODE / folder in path.parents), None)
        folder = "data" if path.name == "mani_data.py" else folder
        title, where = (TITLES[folder], f"code/{folder}") if folder else (path.parent.name, f"code/{path.parent.name}")
        _, used = programs.setdefault(title, (where, set()))
        used |= {*re.findall(r"^\s*(?:from|import) qwen_vl_streaming\.(\w+)", path.read_text("utf-8"), re.MULTILINE)}
    return programs


def wrap(text: str, wide: float, size: float) -> list[str]:
    """`text` in lines of at most `wide` inches in the font size `size`. Breaks after spaces, hyphens and slashes."""
    renderer, font, lines = RendererAgg(1, 1, DPI), FontProperties(size=size), [""]
    for piece in re.split(r"(?<=[ /-])", text):
        longer = lines[-1] + piece
        if lines[-1] and renderer.get_text_width_height_descent(longer.rstrip(), font, False)[0] > wide * DPI:
            lines.append(piece)
        else:
            lines[-1] = longer
    return [line.rstrip() for line in lines if line]


def box(axes, left: float, low: float, wide: float, high: float, title: str, says: str, foot: str, fill: str) -> None:
    """A box with a title, lines that say what it is, and lines at its foot."""
    shape = {"boxstyle": "round,pad=0,rounding_size=0.08", "facecolor": fill, "edgecolor": BLUE, "zorder": 3}
    axes.add_patch(FancyBboxPatch((left, low), wide, high, **shape))
    text = {"zorder": 4, "va": "center", "color": INK}
    axes.text(left + 0.1, low + high - 0.17, title, fontsize=11, weight="bold", **text)
    for number, line in enumerate(wrap(says, wide - 0.2, 7.5)):
        axes.text(left + 0.1, low + high - 0.38 - 0.15 * number, line, fontsize=7.5, **text)
    for number, line in enumerate(reversed(wrap(foot, wide - 0.2, 7))):
        axes.text(left + 0.1, low + 0.11 + 0.13 * number, line, fontsize=7, **(text | {"color": GREY}))


def draw(rooms: dict[str, set[str]], programs: dict[str, tuple[str, set[str]]], path: Path) -> Figure:
    place = places(rooms)
    top = max(floor for floor, _ in place.values())
    high = 0.3 + STEP * top + BOX[1] + 0.95
    figure = Figure(figsize=(WIDE, high), dpi=DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, WIDE)
    axes.set_ylim(0, high)
    axes.set_axis_off()
    axes.text(0.2, high - 0.28, "Programs and rooms of the library", fontsize=15, weight="bold", color=INK, va="center")
    axes.text(0.2, high - 0.56, NOTE, fontsize=9, color=GREY, va="center")

    def corner(floor: int, column: int) -> tuple[float, float]:
        return 0.2 + column * (BOX[0] + 0.34), 0.3 + (floor - 1) * STEP

    def foot(names: set[str]) -> str:
        known = [name for name in sorted(names, key=lambda name: (-place[name][0], name)) if name != BASE]
        return f"imports {', '.join(known)}" if known else ""

    order = [*TITLES.values(), *programs]
    for number, (title, (where, used)) in enumerate(sorted(programs.items(), key=lambda each: order.index(each[0]))):
        wide = (WIDE - 0.4 - 0.15 * (len(programs) - 1)) / len(programs)
        left = 0.2 + number * (wide + 0.15)
        box(axes, left, 0.3 + top * STEP, wide, BOX[1] + 0.1, title, where, foot(used & rooms.keys()), "#FDF1E7")
    style = {"arrowstyle": "-|>", "mutation_scale": 12, "color": INK, "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0}
    for room, other in drawn({name: others - {BASE} for name, others in rooms.items() if name != BASE}):
        (left, low), (to, below) = corner(*place[room]), corner(*place[other])
        across = BOX[0] / 2 if to == left else BOX[0] * (0.85 if to > left else 0.15)
        into = BOX[0] / 2 if to == left else BOX[0] * (0.15 if to > left else 0.85)
        axes.add_patch(FancyArrowPatch((left + across, low), (to + into, below + BOX[1]), **style))
    for room, where in place.items():
        folder = CODE / LIBRARY / room
        source = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
        title = f"{room}/" if folder.is_dir() else f"{room}.py"
        wide = WIDE - 0.4 if room == BASE else BOX[0]
        box(axes, *corner(*where), wide, BOX[1], title, first_sentence(docstring(source)), foot(rooms[room]), PALE)
    figure.savefig(path)
    return figure


def list_files() -> str:
    """files.md."""
    lines = [
        "# Every file",
        "",
        "Made by `python docs/draw_rooms.py` from the first sentence of each file's docstring; do not edit by hand. "
        "[architecture.md](architecture.md) explains how the rooms fit together.",
    ]
    folders: dict[str, list[Path]] = {title: [] for title in TITLES}
    for path in sorted(path for pattern in ("*.py", "*.sh") for path in CODE.rglob(pattern)):
        if {"output", "build"} & {*path.relative_to(CODE).parts}:
            continue
        inside = path.relative_to(CODE).as_posix()
        title = next((title for title in TITLES if inside.startswith(f"{title}/")), path.relative_to(CODE).parts[0])
        if title == "qwen-vl-utils":
            title = path.relative_to(CODE).parent.as_posix()
        folders.setdefault("." if title == path.name else title, []).append(path)
    top = sorted(path for pattern in ("*.py", "*.sh", "docs/*.py") for path in DOCS.parent.glob(pattern))
    folders.setdefault(".", []).extend(top)
    for folder, paths in folders.items():
        title = "At the top" if folder == "." else TITLES.get(folder, f"`code/{folder}`")
        lines += ["", f"## {title}", ""]
        lines += [] if folder == "." or folder not in TITLES else [f"In `code/{folder}`.", ""]
        lines += ["| file | what it is for |", "|---|---|"]
        base = DOCS.parent if folder == "." else CODE / folder
        for path in paths:
            if path.name == "__init__.py" and path.parent == base and not docstring(path):
                continue
            lines.append(f"| `{path.relative_to(base).as_posix()}` | {purpose(path).replace('|', '/')} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=DOCS, help="folder for both files (default: docs)")
    output = parser.parse_args().output
    draw(read_rooms(), read_programs(), output / "rooms.png")
    (output / "files.md").write_text(list_files(), encoding="utf-8")
    print(f"{output / 'rooms.png'}\n{output / 'files.md'}")


if __name__ == "__main__":
    main()
