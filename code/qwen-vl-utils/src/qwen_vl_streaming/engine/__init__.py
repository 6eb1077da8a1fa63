"""Runs the model fast: a paged KV cache, fused layers, CUDA graphs and the vision encoder. Knows nothing about files,
clocks and processes. `reference.py` defines what is correct.

There are two runners over one ModelRunner, because they know different things when a step starts. `Runner` serves
offline batches. It has the plan of each stream, so the positions and masks of all text rows are on the device before
decoding starts. A decode step is the replay of one CUDA graph without inputs, and the host only polls which have
ended. Clips are fed as ragged rows and whole videos as one causal sequence, for throughput; shapes compile when they
first occur. `StepRunner` serves live streams, for latency. What a slot writes and when a clip arrives is not known in
advance, so the host sends the inputs of each step. All shapes are fixed and captured before the first clip, because
compiling during a stream would miss deadlines. One runner would still need both ways to build inputs and all kinds of
attention, and would share little beyond ModelRunner.
"""

from .batch import Job, caption_all
from .step_request import StepRequest
from .step_runner import StepRunner

__all__ = ["Job", "StepRequest", "StepRunner", "caption_all"]
