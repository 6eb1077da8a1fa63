"""Plants small faults in the rules of the idea, one at a time, and counts those that their tests notice.

    pip install mutmut==3.8.1 && python code/benchmarks/mutation.py

Mutates timeline, positions, attention, plan and the evaluation's schedules with mutmut, in a copy of the project in a
temporary folder; a few minutes on two cores. The tests alone take a few seconds. Ends with status 1 where less than
95% of the faults are noticed, those that change nothing left aside.
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
MUTATED = [*(PACKAGE / "timeline" / f"{name}.py" for name in ("timeline", "positions", "attention", "plan"))]
MUTATED.append(ROOT / "code/evaluation/schedules.py")
TESTS = ["test_timeline.py", "test_positions.py", "test_attention.py", "test_plan.py", "test_schedules.py"]
HELPERS = ["tiny.py", "released_positions.py", "released_positions.json"]
NOT_HERE = "not test_block_mask_is_the_dense_mask and not test_packed_samples_never_see_each_other"
"""torch.compile, which FlexAttention is run by, cannot trace what mutmut puts in place of functions."""
LEAST = 0.95
SAME = {
    "key = torch.arange(visual.shape[1], device=None)": "on a CPU; tests/test_gpu.py runs it on a GPU",
    "key = torch.arange(visual.shape[1], )": "likewise",
    "return mask_mod(b, None, q, kv) & (sample[b, q] == sample[b, kv])": "all heads share one mask",
    "full = torch.full((4, count), 0)": "three rows are used",
    "full = torch.full((3, count), 1)": "each is filled",
    "if min(self.quotas, default=1) < 0:": "neither default is below 0",
    'return self.quotas[slot - 1] if slot < self.clips else float("INF")': "the same number",
    "after = layout.prompt + _video_takes(layout, (clips or 2) - bare)": "used only where the clips are known",
    "upto = max(2, int(slots.max()))": "a table with an entry that is not read",
    "known = torch.tensor(counts[:upto], dtype=None)": "int64 by default; without a number nothing is copied",
    "known = torch.tensor(counts[:upto], )": "likewise",
    'text = data.decode("UTF-8-SIG")': "the same encoding",
    "path = find_path(text, root, None)": "the message is replaced by another",
    'path = find_path(text, root, "XXthe scheduleXX")': "likewise",
    'path = find_path(text, root, "THE SCHEDULE")': "likewise",
}
"""Faults that change nothing: the line as mutated, and why."""
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
    """The package, what is mutated and its tests. mutmut leaves decorated methods alone, so a property becomes a method
    and `property(method)`."""
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
    (folder / "pyproject.toml").write_text(CONFIGURATION.format(mutated=places, deselected=NOT_HERE))


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        copy_to(folder)
        # mutmut forks, and a pool of threads does not survive that.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": ""}

        def mutmut(*arguments: str, **options) -> subprocess.CompletedProcess:
            command = [sys.executable, "-m", "mutmut", *arguments]
            return subprocess.run(command, cwd=folder, env=environment, text=True, check=True, **options)

        mutmut("run", "--max-children", str(os.cpu_count()))
        results = mutmut("results", "--all", "true", stdout=subprocess.PIPE).stdout
        outcomes = re.findall(r"^\s*(\S+): (.+)$", results, re.MULTILINE)
        unnoticed, same = 0, 0
        for name, outcome in outcomes:
            if outcome == "killed":
                continue
            diff = mutmut("show", name, stdout=subprocess.PIPE).stdout
            lines = re.findall(r"^\+(?!\+)\s*(.*)$", diff, re.MULTILINE)
            if reason := next((SAME[line] for line in lines if line in SAME), None):
                same += 1
                print(f"changes nothing ({reason}): {' '.join(lines)}")
            else:
                unnoticed += 1
                print(f"{outcome}, {name}: {' '.join(lines)}")
    faults = len(outcomes) - same
    print(f"{faults - unnoticed} of {faults} faults noticed, {1 - unnoticed / faults:.1%}; {same} more change nothing")
    sys.exit(unnoticed > (1 - LEAST) * faults)


if __name__ == "__main__":
    main()
