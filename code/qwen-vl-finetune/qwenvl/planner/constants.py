"""Every number of the planner that only a GPU can confirm, each with the measurement that it comes from.

`code/benchmarks/plans.py` compares predictions with measurements. Measured on H200s with random weights of the real
shapes; see code/benchmarks/RESULTS.md.
"""

GIB = 2**30

# Memory: bytes saved per token and layer for the backward pass, in units of 2-byte rows.
COMPILED_HIDDEN, COMPILED_MLP = 7.5, 3.0
"""Rows of the hidden size and of the MLP's size that a compiled layer saves. 3B: 92.5 KB, 7B: 172 KB per token."""
HEAD = 128
"""Columns of an attention head, at both sizes."""
COPIES_HIDDEN = 2.0
"""Rows of the hidden size more for the copies of key-value heads, where the number of query heads is a power of two:
the other sizes were measured with them. 3B in 11,904 tokens: 2.8 GiB in all layers."""
EAGER_HIDDEN, EAGER_MLP = 12.0, 4.0
"""The same without compilation: RMSNorm saves float32. 7B under ZeRO-3: 227 KB per token."""
BACKWARD_MLP = 3.0
"""Rows of the MLP's size that the backward pass of one layer holds in addition."""
DROPOUT_BYTES = 1.53
"""Per input of an adapter and token, saved with --lora_dropout. Counted on a CPU: 34.8 KiB per token and layer at 3B,
60.5 at 7B."""
LOGITS_BYTES = 14
"""Per target and word of the vocabulary: logits in bf16 and float32, log-softmax, gradient."""
EMBEDDING_ROWS = 8.0
"""Hidden rows per token outside the layers: embeddings, their copy with visual tokens, the final norm."""
PIXEL_BYTES = 4
"""A pixel value on the GPU, where one forward pass has its pixels."""
TOWER_ROW_BYTES = 60_000
"""Working set of the frozen vision tower per patch."""
TOWER_SAVED_HIDDEN, TOWER_SAVED_MLP = 16.0, 4.0
"""Rows per patch and block that a trained vision tower saves."""
MASK_BYTES = 3
"""Bytes for each pair of tokens while FlexAttention's block mask is created. Counted on a CPU."""
GATHERED = 300_000_000
"""Gathered parameters that ZeRO-3 holds besides the largest: those it fetches ahead (stage3_prefetch_bucket_size). 3B
and 7B with compiled layers under offload: 12.7 and 21.9 GiB."""
LIVE_PARAMETERS = 1_000_000_000
"""Parameters that ZeRO-3 may keep (stage3_max_live_parameters): an upper bound for those gathered without compilation,
which was measured before whole layers were gathered, and for float32 gradients."""
CONTEXT = int(0.6 * GIB)
"""CUDA context, cuBLAS workspaces and kernels of a process, outside PyTorch's allocator."""
NCCL = int(1.0 * GIB)
"""NCCL's buffers with several GPUs, outside PyTorch's allocator."""
SLACK = 0.05
"""Share of the memory that fragmentation and errors of the prediction may cost."""

# Speed.
MATRIX_SHARE = 0.80
"""Measured rate of a bf16 matrix product of 8192 x 8192, relative to the nominal rate (H200: 790 of 989 TFLOP/s)."""
WIDE, NARROW = 0.68, 0.69
"""Share of the matrix rate that compiled layers reach in long rows, for a hidden size of 3584 (7B) and 2048 (3B)."""
ATTENTION_TIME = 2.0
"""GPU time of the FLOPs of attention, relative to that of others. 3B with adapters, a pass over 7,430 tokens with 33
of 36 layers recomputed: 0.56 s."""
WIDE_HIDDEN, NARROW_HIDDEN = 3584, 2048
WIDE_OVERHEAD, NARROW_OVERHEAD = 50.0, 180.0
"""Tokens' worth of time that each row costs on top, for the same two sizes. 3B: a pass over one sample of 2,878 tokens
takes 153 ms, one over four 541."""
LORA_TIME = 1.17
"""GPU time of layers with adapters, relative to those without. 3B, two samples in a row: 17,142 and 18,649 tokens/s
with 33 and 20 of 36 layers recomputed."""
MOST_ROW = 16_384
"""Tokens of the longest row that is planned; measured are rows up to 12,288."""
EAGER_TIME = 1.5
"""GPU time of layers that are not compiled, relative to compiled ones (3B: 281 ms a sample instead of 187)."""
VARYING_TIME = 1.1
"""Time of compiled layers with rows of different lengths, relative to rows of one length. Not measured."""
PASS_SECONDS = 0.012
"""Of each forward and backward pass: reading the batch, the mask, and the gaps around it."""
HOST_SECONDS = {
    # (ZeRO-3, compiled, checkpointed): host seconds per layer of the language model and forward and backward pass.
    (False, True, False): 0.003,
    (False, True, True): 0.004,
    (False, False, False): 0.007,
    (False, False, True): 0.0215,
    (True, False, False): 0.036,
    (True, False, True): 0.073,
    (True, True, False): 0.012,
    (True, True, True): 0.012,
}
"""A pass takes at least this long. 3B on 4 GPUs: ZeRO-2 784 ms, ZeRO-3 2,683 ms a sample, both checkpointed, when
ZeRO-3 gathered each linear layer. Compiled layers under ZeRO-3: an upper bound."""
LORA_HOST_FACTOR = 1.5
"""Host seconds of layers with adapters, relative to those above. 3B, compiled, a pass over one sample of 2,878 tokens
on an H200 whose host ran other programs too: 174 ms, 138 at least, of which the GPU computed for 133."""
SHARD_SECONDS = 0.0037
"""Seconds of each layer of the language model by which ZeRO-3 lengthens a forward and backward pass: hooks, copies, and
communication beside the computation. Two H200s, a pass over four samples, measured less what is predicted without: 3B
150 ms, 7B 92 ms. Where layers are recomputed, half as much again, which was not measured."""
OPTIMIZER_BYTES = 200
"""Bytes that an optimizer step of DeepSpeed reads and writes per parameter of a process, besides the optimizer's
states: gradients are flattened, checked, scaled and copied. 3B: a step of ZeRO-1 takes 94 ms less on four H200s than on
one."""
HOST_ADAM = 1.5e9
"""Parameters per second and machine that Adam updates on the host. 3B in full on one H200, four samples of 7,430 tokens
take 4.56 s a step, in keeping with 2.1 for this."""
NETWORK = 20e9
"""Bytes/s of each GPU between nodes that the plan assumes (200 Gbit/s)."""
