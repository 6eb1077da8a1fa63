"""How a step runs fast: the paged KV cache, attention over it, CUDA graphs, the vision encoder. `reference.py` says
what is right. Knows nothing of files, clocks and processes."""
