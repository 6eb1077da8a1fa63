"""What training runs on: GPUs, or the CPU where there are none or it was asked for. Imports nothing heavy but torch:
sft.sh runs this to learn on how many GPUs it is to train; 0 stands for the CPU."""

import os

from qwen_vl_streaming.common.errors import InputError, OneLineParser, run
from qwen_vl_streaming.devices import choose_device, look

USE_CPU = "--use_cpu True"
MOST_ON_CPU = 500_000_000
"""Weights of the largest model that is trained on a CPU without being asked for."""


def settle_device(training) -> str:
    """Set `use_cpu` of TrainingArguments by what this machine has; returns a line that tells of training on the CPU,
    else an empty one. Raises InputError where GPUs cannot be used as they are or as asked."""
    if training.use_cpu:
        return f"training on the CPU, as {USE_CPU} asks"
    devices = look(os.environ)
    device, line = choose_device("", devices, USE_CPU)
    if training.bf16 and not devices.bfloat16:
        raise InputError(f"--bf16 True: no GPU here computes in bfloat16: give --bf16 False, or {USE_CPU} as well")
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if devices.usable and here > devices.usable:
        raise InputError(f"{here} processes on a machine whose GPUs number {devices.usable}: lower NPROC_PER_NODE")
    training.use_cpu = device == "cpu"
    return line


def check_size(config, training, line: str) -> None:
    """Refuse to train a model of this `config` on the CPU without being asked for, after the `line` of
    `settle_device`: a large one would never be done. Raises InputError."""
    weights = count_weights(config, training)
    if weights > MOST_ON_CPU:
        raise InputError(
            f"{line}, for which a model of {weights / 1e6:,.0f} million weights is too large: train where "
            f"PyTorch can use a GPU, or give {USE_CPU}"
        )


def count_weights(config, training) -> int:
    """The weights of a model of this `config`, of which none is made."""
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration
    from transformers.integrations import deepspeed

    deepspeed.unset_hf_deepspeed_config()  # under ZeRO-3 transformers would split, and so make them
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
    on_cpu = arguments.use_cpu.lower() in ("true", "t", "yes", "y", "1")  # as transformers reads it
    if on_cpu:
        print(0)
        return
    devices = look(os.environ)
    choose_device("", devices, USE_CPU)
    print(devices.usable)


if __name__ == "__main__":
    run(main)
