"""Takes the picture of the page of `serve` (serving.png), with a film in front of three trained models of the demo.

    python docs/draw_page.py MODELS FILM

MODELS is the folder in which QWEN2_5_VL_VARIANT=all bash demo.sh puts the trained models. Needs Chromium or Chrome.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path.append(str(DOCS.parent / "tests"))
from browser import Browser  # noqa: E402

VARIANTS = ("batch", "interleave", "group")
WIDTH, HEIGHT = 1425, 1160


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path)
    parser.add_argument("film", type=Path)
    parser.add_argument("--seconds", type=float, default=8.5, help="of the film, until then (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=DOCS / "serving.png")
    arguments = parser.parse_args()
    models = [f"--model={name}={arguments.models}/qwen2_5vl-pe-{name}" for name in VARIANTS]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "qwen_vl_streaming.serve", *models, "--port=0", f"--records={folder}/records"]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            address = next(found[1] for line in server.stdout if (found := re.search(r"open (\S+)", line)))
            with Browser(Path(folder) / "profile") as page:
                page.open(address, WIDTH, HEIGHT)
                page.wait("document.body.dataset.state === 'ready'")
                page.run("document.documentElement.style.scrollbarWidth = 'none'")
                page.run("document.querySelector('[name=source][value=file]').click()")
                page.choose("#file", arguments.film)
                page.run("document.getElementById('action').click()")
                page.wait("['running', 'behind'].includes(document.body.dataset.state)")
                time.sleep(arguments.seconds)
                print(page.picture(arguments.output))
        finally:
            server.kill()
            server.wait()


if __name__ == "__main__":
    main()
