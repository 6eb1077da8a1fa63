"""How many processes eval.sh starts on this node: prints --processes, or else one per GPU, or 1 without a GPU."""

import os

from qwen_vl_streaming.common.errors import InputError, OneLineParser, run
from qwen_vl_streaming.devices import choose_device, look
from qwen_vl_streaming.launch.answer import answer


def count_processes(asked: int, device: str) -> int:
    """Processes on this node, where `asked` were asked for (0: decide here) on `device` (empty: decide here). Raises
    InputError where there are too few GPUs."""
    gpus = 0
    if device != "cpu":
        devices = look(os.environ)
        gpus = devices.usable if choose_device(device, devices)[0] != "cpu" else 0
    processes = asked or (1 if ":" in device or not gpus else slurm_gpus() or gpus)
    check_gpus(processes, device, gpus)
    return processes


def check_gpus(processes: int, device: str, gpus: int) -> None:
    """Raise InputError where `processes` on one node do not each have one of its `gpus`; 0 for the CPU."""
    if gpus and processes > (1 if ":" in device else gpus):
        raise InputError(f"{processes} processes for {gpus} GPUs: use at most one process per GPU, or --device cpu")


def slurm_gpus() -> int:
    """GPUs of this node that SLURM assigned to the job; 0 where it does not say."""
    text = os.environ.get("SLURM_GPUS_ON_NODE", "")
    return int(text) if text.isdecimal() else 0


def main() -> None:
    parser = OneLineParser(prog="eval.sh", add_help=False)
    parser.add_argument("--processes", type=int, default=0)
    parser.add_argument("--device", default="")
    parser.add_argument("--score-only", default="")
    arguments, _ = parser.parse_known_args()
    answer(str(1 if arguments.score_only else count_processes(arguments.processes, arguments.device)))


if __name__ == "__main__":
    run(main)
