"""The device that training runs on: GPUs, or the CPU where there are none or it was asked for.

sft.sh runs this file to learn the number of GPUs, or 0 for the CPU, so it imports nothing slower than torch.
"""

import os

from qwen_vl_streaming.common.errors import InputError, OneLineParser, run
from qwen_vl_streaming.devices import choose_device, look
from qwen_vl_streaming.launch.answer import answer

USE_CPU = "--use_cpu True"
MAX_CPU_PARAMETERS = 500_000_000
"""The largest model that trains on a CPU without `--use_cpu True`."""


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


def check_size(config, training, message: str) -> None:
    """Raises InputError, which begins with the `message` of `choose_training_device`, where a model of this `config` is
    too large to train on the CPU in reasonable time."""
    parameters = count_parameters(config, training)
    if parameters > MAX_CPU_PARAMETERS:
        raise InputError(
            f"{message}, for which a model of {parameters / 1e6:,.0f} million parameters is too large: train where "
            f"PyTorch can use a GPU, or give {USE_CPU}"
        )


def count_parameters(config, training) -> int:
    """The number of parameters of a model of this `config`, without allocating them."""
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration
    from transformers.integrations import deepspeed

    deepspeed.unset_hf_deepspeed_config()  # under ZeRO-3 transformers would partition, and so allocate them
    try:
        with torch.device("meta"):
            return sum(weight.numel() for weight in Qwen2_5_VLForConditionalGeneration(config).parameters())
    finally:
        if training.deepspeed:
            deepspeed.set_hf_deepspeed_config(training.hf_deepspeed_config)


def main() -> None:
    parser = OneLineParser(prog="sft.sh", add_help=False)
    parser.add_argument("--use_cpu", nargs="?", const="True", default="False")
    arguments, _ = parser.parse_known_args()
    if arguments.use_cpu.lower() in ("true", "t", "yes", "y", "1"):  # as transformers parses it
        answer("0")
        return
    devices = look(os.environ)
    choose_device("", devices, USE_CPU)
    answer(str(devices.usable))


if __name__ == "__main__":
    run(main)
