"""What is patched in Qwen2.5-VL, its prompts and its checkpoints. Knows nothing of when clips arrive."""
