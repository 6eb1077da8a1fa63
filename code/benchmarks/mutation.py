"""Mutation testing of the timeline: changes its code in small ways and counts the changes that its tests detect.

    pip install mutmut==3.8.1 && python code/benchmarks/mutation.py

Mutates timeline, positions, attention, plan and the evaluation's schedules with mutmut, in a temporary copy of the
project; takes a few minutes on two cores. Exits with status 1 if the tests detect fewer than 95% of the mutants that
change behaviour.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "code/qwen-vl-utils/src/qwen_vl_streaming"
MUTATED = [*(PACKAGE / f"timeline/{name}.py" for name in ("timeline", "positions", "attention", "plan"))]
MUTATED.append(ROOT / "code/evaluation/schedules.py")
TESTS = ["test_timeline.py", "test_positions.py", "test_attention.py", "test_plan.py", "test_schedules.py"]
HELPERS = ["tiny.py", "released_positions.py", "released_positions.json"]
DESELECTED = "not test_block_mask_is_the_dense_mask and not test_packed_samples_never_see_each_other"
"""FlexAttention runs through torch.compile, which cannot trace the functions that mutmut substitutes."""
MIN_DETECTED = 0.95
EQUIVALENT = {
    "key = torch.arange(visual.shape[1], device=None)": "equal on a CPU; tests/test_gpu.py runs it on a GPU",
    "key = torch.arange(visual.shape[1], )": "as above",
    "return mask_mod(b, None, q, kv) & (sample[b, q] == sample[b, kv])": "all heads share one mask",
    "full = torch.full((4, count), 0)": "only three rows are used",
    "full = torch.full((3, count), 1)": "every element is overwritten",
    "if min(self.quotas, default=1) < 0:": "neither default is below 0",
    'return self.quotas[slot - 1] if slot < self.clips else float("INF")': "the same number",
    "after = layout.prompt + _video_takes(layout, (clips or 2) - bare)": "used only if the number of clips is known",
    "upto = max(2, int(slots.max()))": "the table has an entry that is never read",
    "known = torch.tensor(counts[:upto], dtype=None)": "int64 is the default; with no counts, nothing is copied",
    "known = torch.tensor(counts[:upto], )": "as above",
    'text = data.decode("UTF-8-SIG")': "the same encoding",
    "path = find_path(text, root, None)": "the message is replaced by another one",
    'path = find_path(text, root, "XXthe scheduleXX")': "as above",
    'path = find_path(text, root, "THE SCHEDULE")': "as above",
}
"""Mutants that do not change behaviour: the mutated line, and why."""
CONFIGURATION = """
[tool.mutmut]
source_paths = ["src"]
only_mutate = {mutated}
pytest_add_cli_args = ["-k", "{deselected}"]
pytest_add_cli_args_test_selection = ["tests"]
use_git_change_detection = false
[tool.pytest.ini_options]
filterwarnings = ["ignore"]
"""


def copy_to(folder: Path) -> None:
    """Copy the package, the mutated modules and their tests.

    mutmut skips decorated methods, so each property becomes a method and `property(method)`.
    """
    source, tests = folder / "src", folder / "tests"
    shutil.copytree(PACKAGE, source / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    places = []
    for path in MUTATED:
        place = source / (path.relative_to(PACKAGE.parent) if path.is_relative_to(PACKAGE) else path.name)
        text = re.sub(
            r"    @property\n    def (\w+)(\(.*?)\n(?=\n)",
            r"    def _get_\1\2\n    \1 = property(_get_\1)\n",
            path.read_text(),
            flags=re.DOTALL,
        )
        place.write_text(text)
        places.append(str(place.relative_to(folder)))
    tests.mkdir()
    for name in (*TESTS, *HELPERS):
        shutil.copy(ROOT / "tests" / name, tests)
    (folder / "pyproject.toml").write_text(CONFIGURATION.format(mutated=places, deselected=DESELECTED))


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        copy_to(folder)
        # mutmut forks; a thread pool does not survive a fork.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": ""}

        def mutmut(*arguments: str, **options) -> subprocess.CompletedProcess:
            command = [sys.executable, "-m", "mutmut", *arguments]
            return subprocess.run(command, cwd=folder, env=environment, text=True, check=True, **options)

        mutmut("run", "--max-children", str(os.cpu_count()))
        results = mutmut("results", "--all", "true", stdout=subprocess.PIPE).stdout
        outcomes = re.findall(r"^\s*(\S+): (.+)$", results, re.MULTILINE)
        undetected, equivalent = 0, 0
        for name, outcome in outcomes:
            if outcome == "killed":
                continue
            diff = mutmut("show", name, stdout=subprocess.PIPE).stdout
            lines = re.findall(r"^\+(?!\+)\s*(.*)$", diff, re.MULTILINE)
            if reason := next((EQUIVALENT[line] for line in lines if line in EQUIVALENT), None):
                equivalent += 1
                print(f"equivalent ({reason}): {' '.join(lines)}")
            else:
                undetected += 1
                print(f"{outcome}, {name}: {' '.join(lines)}")
    mutants = len(outcomes) - equivalent
    detected = mutants - undetected
    print(f"detected {detected} of {mutants} mutants, {detected / mutants:.1%}; {equivalent} more are equivalent")
    sys.exit(undetected > (1 - MIN_DETECTED) * mutants)


if __name__ == "__main__":
    main()
