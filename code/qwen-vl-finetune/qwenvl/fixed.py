"""The flags that cannot change when a run resumes. Imports nothing, so that other programs can read it."""

FIXED_FLAGS = (
    "model_name_or_path min_pixels_per_frame max_pixels_per_frame max_pixels_per_video budget "
    "model_max_length pack_tokens per_device_train_batch_size gradient_accumulation_steps num_train_epochs max_steps "
    "train_sampling_strategy "
    "dataloader_drop_last seed data_seed eval_share eval_samples learning_rate mm_projector_lr vision_tower_lr "
    "lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args adam_beta1 adam_beta2 adam_epsilon "
    "weight_decay max_grad_norm neftune_noise_alpha bf16 wait_k schedule max_tokens_per_slot end_of_slot"
)
"""Flags that cannot change, besides --tune_* and --lora_*: they determine the data, its order and the steps."""
FREE_FLAGS = "model_name_or_path pack_tokens per_device_train_batch_size gradient_accumulation_steps"
"""Of these, the flags that are no part of a recipe: the planner of sft.sh chooses them, or the user the model."""


def is_fixed(flag: str) -> bool:
    return flag in FIXED_FLAGS.split() or flag.startswith(("tune_", "lora_"))
