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
