"""Runs eval.sh and sft.sh with stand-ins for the programs that they call."""

import os
import subprocess
from pathlib import Path

SLURM = {
    "SLURM_NNODES": "3",
    "SLURM_NODEID": "2",
    "SLURM_JOB_NODELIST": "gpu[05,07-08,11]",  # of the whole job, of which srun uses three nodes
    "SLURM_STEP_NODELIST": "gpu[07-08,11]",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_GPUS_ON_NODE": "8",
    "SLURM_JOB_ID": "4321",
}


def launched(command: list, folder: Path, python: str, scontrol: str, environment: dict[str, str]):
    """Runs a launcher where `python` and `scontrol` are these shell scripts, kept in `folder`. Returns status, the
    flags that the last command got, and stderr."""
    folder.mkdir(exist_ok=True)
    for name, says in (("python", python), ("scontrol", scontrol)):
        (folder / name).write_text(f"#!/bin/sh\n{says}\n")
        (folder / name).chmod(0o755)
    path = f"{folder}:{os.environ['PATH']}"
    done = subprocess.run(command, env={"PATH": path, **environment}, capture_output=True, text=True)
    words = done.stdout.split()
    return done.returncode, {words[i]: words[i + 1] for i in range(len(words) - 1)}, done.stderr


def check_several_nodes_need_srun(launch) -> None:
    """An sbatch file runs on the first node alone, with SLURM_NNODES of the job."""
    batch = {name: value for name, value in SLURM.items() if "STEP" not in name} | {"SLURM_NODEID": "0"}
    status, _, said = launch(**batch)
    assert (status, said) == (
        2, "error: this job has 3 nodes, and the command runs on one of them: put srun before it, or set NNODES=1\n"
    )  # fmt: skip
    assert launch(**batch, NNODES="1")[0] == launch(**batch | {"SLURM_NNODES": "1"})[0] == 0
