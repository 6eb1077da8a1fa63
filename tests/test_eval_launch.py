"""eval.sh on one node, on several, and under SLURM: the command that it runs."""

import shutil
from pathlib import Path

import pytest
from launchers import SLURM, check_several_nodes_need_srun, launched

SCRIPT = Path(__file__).parents[1] / "eval.sh"
PYTHON = (
    'case "$1 $2" in -c*socket*) echo 40123 ;; *processes.py*) [ $3 = 0 ] && echo ${GPUS:-4} >&3 || echo $3 >&3 ;; '
    '*redact) shift 2; echo "+ $*" ;; esac'
)


@pytest.fixture
def launch(tmp_path):
    """Runs eval.sh with a `python` that only prints 4 processes and a free port. Returns the status, the flags of the
    last command, and stderr."""
    shutil.copy(SCRIPT, tmp_path / "eval.sh")
    (tmp_path / "code").mkdir()
    shutil.copy(SCRIPT.parent / "code/launch.sh", tmp_path / "code")

    def run(*flags: str, scontrol: str = "exit 1", **environment: str):
        return launched(["bash", tmp_path / "eval.sh", *flags], tmp_path / "bin", PYTHON, scontrol, environment)

    return run


@pytest.mark.parametrize(
    "environment, processes, nodes, rank, address, port",
    [
        ({"GPUS": "1"}, None, None, None, None, None),
        ({}, "4", "1", "0", "127.0.0.1", "40123"),
        ({"NPROC_PER_NODE": "2", "MASTER_PORT": "1234"}, "2", "1", "0", "127.0.0.1", "1234"),
        ({"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1"}, "4", "2", "1", "10.0.0.1", "29500"),
        (SLURM, "4", "3", "2", "gpu07", "29821"),
        ({**SLURM, "GPUS": "1"}, "1", "3", "2", "gpu07", "29821"),
        ({**SLURM, "SLURM_STEP_NODELIST": "a-1,b-2", "MASTER_PORT": "7"}, "4", "3", "2", "a-1", "7"),
        ({**SLURM, "SLURM_NNODES": "1", "SLURM_NODEID": "0"}, "4", "1", "0", "127.0.0.1", "40123"),
        ({**SLURM, "NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "x", "NPROC_PER_NODE": "1"}, *"121x", "29821"),
        ({**SLURM, "scontrol": "echo first.host; echo second.host"}, "4", "3", "2", "first.host", "29821"),
    ],
)
def test_processes_nodes_and_addresses(launch, environment, processes, nodes, rank, address, port):
    status, flags, said = launch("--limit", "3", **environment)
    assert (status, said, flags["--limit"]) == (0, "", "3")
    names = ("--nproc_per_node", "--nnodes", "--node_rank", "--master_addr", "--master_port")
    assert tuple(flags.get(name) for name in names) == (processes, nodes, rank, address, port)


@pytest.mark.parametrize(
    "name, value",
    [("NNODES", "abc"), ("NNODES", "0"), ("NNODES", "-1"), ("NNODES", "1.5"), ("NODE_RANK", "1"), ("MASTER_PORT", "x"),
     ("MASTER_PORT", "70000"), ("NPROC_PER_NODE", "all")],
)  # fmt: skip
def test_invalid_numbers_are_refused(launch, name, value):
    status, _, said = launch(**{name: value})
    assert status == 2 and said.count("\n") == 1 and said.startswith(f"error: {name}={value}: give a whole number")


def test_one_task_per_node(launch):
    status, _, said = launch(**SLURM, SLURM_LOCALID="1")
    assert status == 2 and said.count("\n") == 1 and "--ntasks-per-node=1" in said


def test_several_nodes_without_srun_are_refused(launch):
    check_several_nodes_need_srun(launch)
