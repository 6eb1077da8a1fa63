"""However a data worker or a process of a training run fails, the whole run exits within 30 seconds with a status other
than 0 and one line that names the cause, and the same command resumes it."""

import contextlib
import os
import queue
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from forked import Launched, name_of
from qwen_vl_streaming.common import ending
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.launch import nodes as watch
from qwen_vl_streaming.launch.signals import STOPPED
from qwen_vl_streaming.model.loading import Qwen2_5_VLForConditionalGeneration, load_model
from qwenvl.checkpointing import SaveError, loading, saving
from torch.distributed import PrefixStore, TCPStore
from training import flags, free_port, history
from waiting import SECONDS, until

FINETUNE = Path(__file__).parents[1] / "code/qwen-vl-finetune"
KILLED = "killed by SIGKILL (Linux does this when it runs out of memory)"


def launch(log: Path, *what: str, processes: int = 2, nodes: int = 1, rank: int = 0, port: int = 0, **environment):
    """Start the launcher with `python -m WHAT` as its processes, and their output in `log`."""
    paths = os.pathsep.join([str(FINETUNE), *filter(None, sys.path)])
    given = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **environment}
    command = ["--nproc_per_node", processes, "--nnodes", nodes, "--node_rank", rank, "--master_addr", "127.0.0.1"]
    return Launched([*command, "--master_port", port or free_port(), "-m", *what], log, **given)


def left(log: Path) -> list[psutil.Process]:
    """The processes of the run with this `log` that have not exited: forks by their name, others by LOG."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            ours = process.name().startswith(name_of(log)) or process.environ().get("LOG") == str(log)
            if ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def ends(launcher: Launched, log: Path, status: int, seconds: float = SECONDS) -> str:
    """Wait until no process is left; returns the line that names the cause."""
    assert launcher.wait(seconds) == status, log.read_text()[-3000:]
    until(lambda: not left(log))
    said = log.read_text()
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    if status == STOPPED:
        assert not lines
        return ""
    assert len(lines) == 1 and said.splitlines()[-1] == lines[0], said[-3000:]
    return lines[0]


CAUSES = {
    "gpu": (1, 0, "process 1: out of GPU memory (CUDA out of memory. Tried to allocate 2.00 GiB): omit the flags"),
    "worker killed": (1, 0, f"process 1: a data worker was {KILLED}: lower --dataloader_num_workers"),
    "worker bug": (1, 2, "process 1: in a data worker: KeyError: 'human_caption': the same command resumes"),
    "peer": (1, 0, f"process 1 was {KILLED}: the same command resumes"),
    "refused": (2, 0, "checkpoint-3 is damaged: remove it"),
}


def test_a_failing_process_ends_those_that_wait_for_it(tmp_path):
    """All cases run at once, since most of the time is waiting."""
    logs = {what: tmp_path / what for what in CAUSES}
    launchers = {what: launch(log, "fake_rank", what, GRACE="3") for what, log in logs.items()}
    for what, (status, tracebacks, line) in CAUSES.items():
        assert ends(launchers[what], logs[what], status).startswith(f"error: {line}")
        assert logs[what].read_text().count("Traceback") == tracebacks


def test_a_failing_node_ends_the_others(tmp_path):
    """The process of the first node waits for that of the second."""
    logs, port = [tmp_path / "first", tmp_path / "second"], free_port()
    common = {"processes": 1, "nodes": 2, "port": port}
    runs = [launch(log, "fake_rank", "gpu", rank=rank, **common) for rank, log in enumerate(logs)]
    first, second = (run.wait(SECONDS) for run in runs)
    assert (first, second) == (1, 1)
    cause = "process 1: out of GPU memory (CUDA out of memory. Tried to allocate 2.00 GiB)"
    for log, where in zip(logs, ("node 1, ", ""), strict=True):
        (line,) = log.read_text().splitlines()
        assert line.startswith(f"error: {where}{cause}")


def test_a_node_that_fails_before_the_store_responds_tells_the_others(monkeypatch):
    """Before it exits: node 0 waits for a node that it has not seen."""
    port, said = free_port(), queue.SimpleQueue()
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    monkeypatch.setattr(watch, "TCPStore", lambda *where, **how: time.sleep(1) or TCPStore(*where, **how))
    first = watch.Nodes(0, 2, "127.0.0.1", port, lambda *what: said.put(what))
    second = watch.Nodes(1, 2, "127.0.0.1", port, lambda *what: said.put(what))
    second.fail(1, "process 1: out of GPU memory", started=True)
    assert PrefixStore("launchers", store).check(["fault"])
    assert said.get(timeout=SECONDS) == (1, "process 1: out of GPU memory") and first.ended.is_set()


def test_a_run_resumes_after_every_kind_of_failure(undisturbed, made, tmp_path):
    """Two processes with four data workers each; every start resumes from what the previous one has saved."""
    out = tmp_path / "out"
    arguments = flags(made, out, gradient_accumulation_steps=1, dataloader_num_workers=4, save_steps=2)

    def run(name: str, fault: str):
        log = tmp_path / name
        return launch(log, "faulty", *arguments, FAULT=fault), log

    line = ends(*run("within a step", "kill worker 1 3"), 1)
    assert line.startswith(f"error: process 1: a data worker was {KILLED}")
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]

    line = ends(*run("while saving", "save kill 0 4"), 1)
    assert line.startswith(f"error: process 0 was {KILLED}: the same command resumes")
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]

    launcher, log = run("at start-up", "none 0 0")
    until(lambda: len(psutil.Process(launcher.pid).children()) == 2)
    psutil.Process(launcher.pid).children()[1].kill()
    assert ends(launcher, log, 1).startswith(f"error: process 1 was {KILLED}")

    launcher, log = run("stopped", "stop all 1 5")  # together with its data workers
    ends(launcher, log, STOPPED)
    assert (out / "checkpoint-5").exists(), log.read_text()[-5000:]

    launcher, log = run("to the end", "stop worker 1 10")  # which is ignored
    assert launcher.wait(2 * SECONDS) == 0, log.read_text()[-3000:]
    found = history(out)
    assert sorted(found) == list(range(1, 13))
    for step, losses in history(undisturbed).items():
        assert found[step] == pytest.approx(losses, abs=1e-4), step


def lost(how: str) -> RuntimeError:
    return RuntimeError(f"DataLoader worker (pid 7) {how}")


@pytest.mark.parametrize("error, line", [
    (lost("is killed by signal: Killed. "), f"a data worker was {KILLED}: HOST"),
    (lost("is killed by signal: Segmentation fault. "), "a data worker was killed by SIGSEGV: HOST"),
    (lost("is killed by signal: Bus error. It is possible"), "a data worker was killed by SIGBUS: shared"),
    (lost("exited unexpectedly with exit code 3. Details"), "a data worker ended with status 3: HOST"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), "out of GPU memory (CUDA out of memory. Tried): GPU"),
    (RuntimeError("CUDA error: out of memory\nmore"), "out of GPU memory (CUDA error: out of memory): GPU"),
    (MemoryError(), "out of memory (MemoryError): HOST"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you"), "out of memory (["),
    (OSError(28, "No space left on device", "/x"), "the disk is full ([Errno 28] No space left on device: '/x'): free"),
    (InputError("what and how"), "what and how"),
    (RuntimeError("mat1 and mat2"), None),
    (RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nOriginal"), None),
])  # fmt: skip
def test_resource_errors_are_explained(error, line):
    said = ending.explain(error, "GPU", "HOST")
    assert said is None if line is None else said.startswith(line)


def test_a_lost_worker_is_found_in_a_chain_of_errors():
    try:
        try:
            raise lost("is killed by signal: Killed. ")
        except RuntimeError as error:
            raise RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly") from error
    except RuntimeError as error:
        assert ending.lost_worker(error) == "was killed by SIGKILL"


def test_other_errors_are_not_blamed_on_the_disk_or_the_checkpoint(tmp_path, monkeypatch):
    gone = [torch.OutOfMemoryError("CUDA out of memory"), torch.distributed.DistBackendError("NCCL error")]
    for error in (*gone, lost("is killed by signal: Killed. ")):
        with pytest.raises(type(error)) as raised, saving(tmp_path):
            raise error
        assert not isinstance(raised.value, SaveError)
    for error in gone:
        with pytest.raises(type(error)), loading(tmp_path):
            raise error

    def load(*_, **__):
        raise lost("is killed by signal: Killed. ")

    (tmp_path / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    monkeypatch.setattr(Qwen2_5_VLForConditionalGeneration, "from_pretrained", load)
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        load_model(tmp_path, "sdpa", torch.float32)


def test_workers_end_with_their_process(tmp_path):
    """They ignore SIGTERM."""
    (tmp_path / "parent.py").write_text(
        "import os, time, torch\nfrom functools import partial\n"
        "from qwen_vl_streaming.common.ending import start_worker\n"
        "def begin(worker, parent): start_worker(parent)\n"
        "class Slow(torch.utils.data.Dataset):\n def __len__(self): return 99\n"
        " def __getitem__(self, index): time.sleep(0.1); return index\n"
        "init = partial(begin, parent=os.getpid())\n"
        "for item in torch.utils.data.DataLoader(Slow(), num_workers=4, worker_init_fn=init):\n"
        " print(item, flush=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, tmp_path / "parent.py"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as parent:
        parent.stdout.readline()
        workers = psutil.Process(parent.pid).children()
        for worker in workers:
            worker.terminate()
        parent.stdout.readline()
        assert len(workers) == 4 and all(worker.is_running() for worker in workers)
        parent.send_signal(signal.SIGKILL)
        assert not psutil.wait_procs(workers, timeout=SECONDS)[1]
