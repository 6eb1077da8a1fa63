"""Split-KV attention, as in flash-decoding: attention over several splits of the keys at once, whose results are
combined. A few queries alone do not fill a GPU.

    n slots in a step   Q queries of each   W blocks per slot   D head size
"""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from .chunk_attention import has_chunk_kernel
from .kv_cache import BLOCK_SIZE, PagedKVCache

CHUNK_KERNEL_OPTIONS: dict = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}
"""FlexAttention's kernel_options for prefill chunks, measured on an H200."""
MAX_SPLITS = 7
"""The most splits of chunks. Combining 8 takes longer, since the compiler makes another kind of kernel."""
MAX_DECODE_SPLITS = 64
"""As many as one kernel combines in registers."""


def fit_options(kernel_options: dict | None, dtype: torch.dtype) -> dict | None:
    """FlexAttention's `kernel_options`, measured in bfloat16, for `dtype`. In float32 they take more shared memory than
    most GPUs have."""
    if kernel_options is None or dtype.itemsize <= 2:
        return kernel_options
    return {**kernel_options, "BLOCK_N": 32, "num_stages": 1}


def list_blocks(flags: Tensor, blocks: Tensor, splits: int) -> tuple[Tensor, Tensor]:
    """The block mask's lists of those `blocks` (n, query blocks, W) that `flags` (lists, n, query blocks, W) selects,
    divided among `splits`: (lists, n x splits, 1, query blocks, blocks of a split), and the length of each list."""
    # Not by sorting, which would take the longest to compile of all that a step contains.
    width = -(-flags.shape[-1] // splits) * splits
    target = (flags.cumsum(-1) - 1).where(flags, width)
    listed = blocks.new_zeros(*flags.shape[:-1], width + 1).scatter(-1, target, blocks.expand_as(flags))[..., :width]
    # (lists, n, query blocks, blocks of a split, splits) to (lists, n x splits, 1, query blocks, blocks of a split)
    listed = listed.unflatten(-1, (-1, splits)).movedim(-1, 2).flatten(1, 2)[:, :, None]
    split = torch.arange(splits, device=blocks.device)[:, None]
    return listed, ((flags.sum(-1)[:, :, None] - split + splits - 1) // splits).flatten(1, 2)[:, :, None]


def flex_split_kv(query: Tensor, keys: Tensor, values: Tensor, splits: int, **options) -> Tensor:
    """FlexAttention for `query` (n, heads, Q, D) with a block mask of n x `splits` lists of blocks, and `options` of
    `flex_attention`."""
    return combine_splits(*flex_splits(query, keys, values, splits, **options), splits)


def flex_splits(query: Tensor, keys: Tensor, values: Tensor, splits: int, **options) -> tuple[Tensor, Tensor | None]:
    """As `flex_split_kv` without combining: the output (n x splits, heads, Q, D) over each split, and its log-sum-exp
    in the same shape, or None for one split."""
    options["kernel_options"] = fit_options(options.get("kernel_options"), query.dtype)
    if splits == 1:
        return flex_attention(query, keys, values, **options), None
    # FlexAttention's decoding kernel takes one slot's queries for all splits. The other one would order its output so.
    one_slot = len(query) == 1 and query.shape[2] < BLOCK_SIZE
    repeated = query.expand(splits, -1, -1, -1) if one_slot else query.repeat_interleave(splits, 0)
    output, aux = flex_attention(repeated, keys, values, **options, return_aux=AuxRequest(lse=True))
    lse: Tensor = aux.lse  # pyright: ignore[reportAssignmentType]  # requested, so not None
    return output, lse[..., None].expand(output.shape)


def combine_splits(output: Tensor, lse: Tensor | None, splits: int) -> Tensor:
    """Attention over all keys, from the `output` (n x splits, …) over each split and its log-sum-exp in the same shape,
    which is -inf for a split without keys. The compiler makes one kernel of it: all steps have this shape, and the sum
    is the last."""
    if lse is None:
        return output
    output, lse = output.unflatten(0, (-1, splits)), lse.unflatten(0, (-1, splits))
    weight = (lse - lse.amax(1, keepdim=True).clamp(min=torch.finfo(lse.dtype).min)).exp()
    weight = weight / weight.sum(1, keepdim=True).clamp(min=torch.finfo(lse.dtype).tiny)
    return (output.float() * weight).sum(1).to(output.dtype)


def kernel_settings(cache: PagedKVCache, n: int, queries: int, groups: int, kernel_options: dict) -> dict:
    """`kernel_options`, `splits` and `use_kernel` of a PagedAttention of n x `queries`. Many queries are chunks, for
    which there may be a kernel. With few, these are the given `kernel_options` and no splits, because FlexAttention's
    decoding kernel splits the keys itself. It combines them in three kernels, where one is enough for a single slot,
    whose splits are therefore ours."""
    if queries * groups >= BLOCK_SIZE:
        use_kernel = has_chunk_kernel(cache)
        splits = num_kernel_splits(cache, n, queries, groups) if use_kernel else num_splits(cache, n * queries * groups)
        return {"kernel_options": CHUNK_KERNEL_OPTIONS, "splits": splits, "use_kernel": use_kernel}
    if n == 1 and (splits := num_decode_splits(cache)) > 1:
        return {"kernel_options": {**kernel_options, "SPLIT_KV": 1}, "splits": splits}
    return {"kernel_options": kernel_options, "splits": 1}


def num_splits(cache: PagedKVCache, rows: int) -> int:
    """With how many splits FlexAttention takes the least time, for `rows` queries per key head. By measurements on an
    H200: a processor runs two blocks of queries at once in 1.5 times the time of one, and to combine splits takes time
    for each of them."""
    query_blocks = -(-rows * cache.store.shape[1] // CHUNK_KERNEL_OPTIONS["BLOCK_M"])
    if (processors := _processors(cache)) == 1:
        return 1  # a CPU

    def time(splits: int) -> float:
        """Relative to the time of one block with all keys."""
        each = -(-query_blocks * splits // processors)
        return (each // 2 * 1.5 + each % 2) / splits + (3e-4 * query_blocks * splits if splits > 1 else 0)

    return min(range(1, MAX_SPLITS + 1), key=time)


def num_kernel_splits(cache: PagedKVCache, n: int, queries: int, groups: int) -> int:
    """With how many splits the kernel of `hopper_attention.py` takes the least time, for n x `queries` of each head. By
    measurements on an H200: a program, which has a processor and BLOCK_SIZE queries of a key head, takes as long to
    begin and to end as for four blocks of keys. To combine 800 rows (n x `queries` x splits) takes as long."""
    programs = n * -(-queries * groups // BLOCK_SIZE) * cache.store.shape[1]
    processors, blocks = _processors(cache), cache.block_tables.shape[1]

    def time(splits: int) -> float:
        """In units of the time that a block of keys takes."""
        combining = n * queries * splits / 200 if splits > 1 else 0
        return -(-programs * splits // processors) * (-(-blocks // splits) + 4) + combining

    return min(range(1, MAX_SPLITS + 1), key=time)


def num_decode_splits(cache: PagedKVCache) -> int:
    """How many splits give each processor of the GPU a key head of one decode row."""
    return min(max(_processors(cache) // cache.store.shape[1], 1), MAX_DECODE_SPLITS)


def _processors(cache: PagedKVCache) -> int:
    device = cache.store.device
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
