"""Runs a program in many processes, on one node or several, with torchrun: `python -m qwen_vl_streaming.launch` takes
torchrun's arguments and ends as a whole, with one line that names the cause. Training and evaluation use it.

A program's processes call `signals.die_with_launcher` before their heavy imports, and then `failing.run_rank`. The
variables read here are those that torchrun and the launcher set. Knows nothing about models and videos.
"""
