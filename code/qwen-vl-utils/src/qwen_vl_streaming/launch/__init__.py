"""Runs a program in several processes, on one or more nodes, with torchrun. Training and evaluation use it.

`python -m qwen_vl_streaming.launch` takes torchrun's arguments. When one process fails, all of them end, and one line
names the cause. Each process of a program calls `signals.die_with_launcher` before its heavy imports, then
`failing.run_rank`. The environment variables that are read here are set by torchrun and the launcher. Knows nothing
about models and videos.
"""
