"""One process of a training run, as the launcher starts it. It ends with its launcher, even during imports."""

from qwen_vl_streaming.launch.signals import die_with_launcher

from .startup import Startup

GPU = (
    "omit the flags that the planner would choose, lower --max_pixels_per_video, use more GPUs, or set "
    "DEEPSPEED_CONFIG=zero3_offload.json, with another --output_dir if a checkpoint has been saved"
)
HOST = "lower --dataloader_num_workers or give the run more memory; the same command resumes from the newest checkpoint"
"""What to do when GPU memory or host memory runs out."""


def main() -> None:
    startup = Startup()
    die_with_launcher()
    from qwen_vl_streaming.launch.failing import run_rank  # from here on every error is reported in one line

    def train() -> None:
        from .train import main

        startup.end("imports")
        main(startup)

    run_rank(train, GPU, HOST)


if __name__ == "__main__":
    main()
