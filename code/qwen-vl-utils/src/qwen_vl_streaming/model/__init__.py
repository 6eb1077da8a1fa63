"""The Qwen2.5-VL model with its changes, its prompts and its checkpoints. Independent of when clips arrive."""
