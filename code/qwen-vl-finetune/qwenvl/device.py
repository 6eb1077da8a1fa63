"""The device that training runs on: GPUs, or the CPU where there are none or it was asked for.

sft.sh runs this file, or the planner, to learn the number of GPUs, or 0 for the CPU, so it imports nothing slower than
torch.
"""

import os
import sys

from qwen_vl_streaming.common.errors import InputError, OneLineParser, run
from qwen_vl_streaming.devices import choose_device, look
from qwen_vl_streaming.launch.answer import answer

USE_CPU = "--use_cpu True"


def choose_training_device(training) -> str:
    """Set `use_cpu` of TrainingArguments to what this machine has. Returns a message if that is the CPU, else an empty
    string. Raises InputError where GPUs cannot be used, or not as asked."""
    if training.use_cpu:
        return f"training on the CPU because of {USE_CPU}"
    devices = look(os.environ)
    device, message = choose_device("", devices, USE_CPU)
    if training.bf16 and not devices.bfloat16:
        raise InputError(
            f"--bf16 True: no GPU of this machine supports bfloat16: give --bf16 False, or {USE_CPU} as well"
        )
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if devices.usable and processes > devices.usable:
        raise InputError(f"{processes} processes on a machine with {devices.usable} GPUs: lower NPROC_PER_NODE")
    training.use_cpu = device == "cpu"
    return message


def find_gpus(words: list[str]) -> int:
    """The number of GPUs that training with the flags `words` can use, or 0 for the CPU. Raises InputError where GPUs
    cannot be used."""
    parser = OneLineParser(prog="sft.sh", add_help=False)
    parser.add_argument("--use_cpu", nargs="?", const="True", default="False")
    arguments, _ = parser.parse_known_args(words)
    if arguments.use_cpu.lower() in ("true", "t", "yes", "y", "1"):  # as transformers parses it
        return 0
    devices = look(os.environ)
    choose_device("", devices, USE_CPU)
    return devices.usable


def main() -> None:
    answer(str(find_gpus(sys.argv[1:])))


if __name__ == "__main__":
    run(main)
