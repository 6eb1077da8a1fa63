"""One process of a training run, as the launcher starts it. It ends with its launcher, even while it still imports."""

from qwen_vl_streaming.launch.signals import die_with_launcher

GPU = (
    "lower --per_device_train_batch_size or --max_pixels_per_video, use more GPUs, "
    "or DEEPSPEED_CONFIG=zero3_offload.json, in another --output_dir where a checkpoint was saved"
)
HOST = "lower --dataloader_num_workers or give the run more memory, and it resumes from the newest checkpoint"
"""What to do where memory runs out."""


def main() -> None:
    die_with_launcher()
    from qwen_vl_streaming.launch.failing import run_rank  # from here on whatever goes wrong is reported in one line

    def train() -> None:
        from .train import main

        main()

    run_rank(train, GPU, HOST)


if __name__ == "__main__":
    main()
