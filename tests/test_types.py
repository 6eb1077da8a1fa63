"""The library's annotations hold for a type checker, as `py.typed` promises. Works offline: basedpyright brings all it
needs."""

import json
import subprocess
import sys

import pytest
from published import ROOT

LIBRARY = ROOT / "code/qwen-vl-utils/src/qwen_vl_streaming"


@pytest.mark.long
def test_the_library_has_no_type_errors():
    command = [sys.executable, "-m", "basedpyright", "--pythonpath", sys.executable, "--outputjson"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout, done.stderr
    report = json.loads(done.stdout)
    errors = [
        f"{error['file']}:{error['range']['start']['line'] + 1}: {error['message']} ({error.get('rule')})"
        for error in report["generalDiagnostics"]
    ]
    assert not errors, "\n".join(errors)
    assert report["summary"]["filesAnalyzed"] == len(list(LIBRARY.rglob("*.py")))
    assert done.returncode == 0, done.stderr
