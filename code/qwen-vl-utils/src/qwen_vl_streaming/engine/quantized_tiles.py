"""Made by `code/benchmarks/weights.py products` on an NVIDIA H200; do not edit by hand.

By outputs and inputs of a linear layer: up to how many rows the kernel for 8-bit weights uses which tiles. With more
rows, and where there are none, another way is faster: see `quantized_linear.py`.
"""

TILES: dict[tuple[int, int], tuple[tuple[int, tuple[int, int, int, int, int, int] | None], ...]] = {
    (4608, 3584): (
        (1, None),
        (16, (64, 16, 0, 576, 4, 4)),
        (64, (64, 64, 0, 288, 4, 3)),
        (96, (128, 64, 32, 132, 8, 3)),
        (256, (128, 128, 0, 132, 8, 3)),
    ),
    (3584, 3584): (
        (1, None),
        (16, (64, 16, 0, 448, 4, 4)),
        (64, (64, 64, 0, 224, 4, 3)),
        (96, (128, 64, 32, 132, 8, 3)),
        (256, (128, 128, 0, 132, 8, 3)),
    ),
    (37888, 3584): (
        (1, None),
        (16, (64, 16, 0, 0, 4, 4)),
        (64, (64, 64, 0, 0, 4, 3)),
        (96, (128, 64, 32, 264, 8, 3)),
        (256, (128, 128, 0, 132, 8, 3)),
    ),
    (3584, 18944): (
        (1, None),
        (16, (64, 16, 0, 448, 4, 4)),
        (64, (64, 64, 0, 224, 4, 3)),
        (96, (128, 64, 32, 132, 8, 3)),
        (256, (128, 128, 0, 132, 8, 3)),
    ),
}
