"""sft.sh on one node, on several, and under SLURM: what it would run."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "code/qwen-vl-finetune/scripts/sft.sh"
SLURM = {
    "SLURM_NNODES": "3",
    "SLURM_NODEID": "2",
    "SLURM_JOB_NODELIST": "gpu[07-08,11]",
    "SLURM_GPUS_ON_NODE": "8",
    "SLURM_JOB_ID": "4321",
}


PYTHON = 'case "$1 $2" in -c*socket*) echo 40123 ;; -c*) echo 4 ;; esac'


@pytest.fixture
def launch(tmp_path):
    """Runs sft.sh where `python` only says 4 GPUs and a free port. Returns status, the launcher's flags, and stderr."""
    script = tmp_path / "code/qwen-vl-finetune/scripts/sft.sh"
    script.parent.mkdir(parents=True)
    shutil.copy(SCRIPT, script)
    programs = tmp_path / "bin"
    programs.mkdir()

    def run(scontrol: str | None = None, **environment: str):
        for name, says in (("python", PYTHON), ("scontrol", scontrol or "exit 1")):
            (programs / name).write_text(f"#!/bin/sh\n{says}\n")
            (programs / name).chmod(0o755)
        path = f"{programs}:{os.environ['PATH']}"
        done = subprocess.run(["bash", script], env={"PATH": path, **environment}, capture_output=True, text=True)
        words = done.stdout.split()
        return done.returncode, {words[i]: words[i + 1] for i in range(len(words) - 1)}, done.stderr

    return run


@pytest.mark.parametrize(
    "environment, nproc, nnodes, rank, address, port",
    [
        ({}, "4", "1", "0", "127.0.0.1", "40123"),
        ({"NPROC_PER_NODE": "2", "MASTER_PORT": "1234"}, "2", "1", "0", "127.0.0.1", "1234"),
        ({"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1"}, "4", "2", "1", "10.0.0.1", "29500"),
        (SLURM, "8", "3", "2", "gpu07", "29821"),
        ({**SLURM, "SLURM_JOB_NODELIST": "a-1,b-2"}, "8", "3", "2", "a-1", "29821"),
        ({**SLURM, "SLURM_NNODES": "1", "SLURM_NODEID": "0"}, "8", "1", "0", "127.0.0.1", "40123"),
        ({**SLURM, "NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "x", "NPROC_PER_NODE": "1"}, *"121x", "29821"),
        ({**SLURM, "scontrol": "echo first.host; echo second.host"}, "8", "3", "2", "first.host", "29821"),
    ],
)  # fmt: skip
def test_where_and_how_many(launch, environment, nproc, nnodes, rank, address, port):
    status, flags, said = launch(**environment)
    assert (status, said) == (0, "")
    names = ("--nproc_per_node", "--nnodes", "--node_rank", "--master_addr", "--master_port")
    assert tuple(flags[name] for name in names) == (nproc, nnodes, rank, address, port)


def test_one_task_a_node(launch):
    status, _, said = launch(**SLURM, SLURM_LOCALID="1")
    assert status == 2 and said.count("\n") == 1 and "--ntasks-per-node=1" in said


@pytest.mark.parametrize("name, value", [
    ("NPROC_PER_NODE", "0"), ("NPROC_PER_NODE", "all"), ("NNODES", "two"), ("NNODES", "0"), ("NODE_RANK", "1"),
    ("NODE_RANK", "-1"), ("MASTER_PORT", "x"), ("MASTER_PORT", "70000"), ("MASTER_PORT", "0"),
])  # fmt: skip
def test_numbers_are_numbers(launch, name, value):
    status, _, said = launch(**{name: value})
    assert status == 2 and said.count("\n") == 1 and said.startswith(f"error: {name}={value}: give a whole number")


def test_a_number_may_begin_with_naught(launch):
    assert launch(NNODES="12", NODE_RANK="08", MASTER_ADDR="x")[0] == 0


def test_a_port_that_is_taken():
    command = [sys.executable, "-m", "qwenvl.launch", "--nproc_per_node", "1", "--nnodes", "1", "--node_rank", "0"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        command += ["--master_addr", "127.0.0.1", "--master_port", str(taken.getsockname()[1]), "-m", "this"]
        done = subprocess.run(command, cwd=SCRIPT.parents[1], capture_output=True, text=True)
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and [line.startswith("error: ") for line in lines].count(True) == 1
    assert "MASTER_PORT" in lines[-1] and "Traceback" not in done.stderr
