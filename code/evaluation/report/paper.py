"""The paper's values (arXiv 2601.06843, January 2026), which a report shows beside ours.

Knows nothing about our results.
"""

METRICS = ("CIDEr", "BLEU-1", "BLEU-4", "METEOR", "ROUGE-L", "BLEURT", "Fluency")
"""In the order of the paper's tables. All are multiplied by 100, except Fluency, which an LLM judges from 1 to 5."""

SIZES = ("3B", "7B")
SHAPES = {(2048, 36): "3B", (3584, 28): "7B"}
"""Size by hidden size and number of layers of the language model in Qwen2.5-VL."""

SETTINGS = {
    "repetition_penalty": 1.15,
    "max_new_tokens": 300,
    "min_pixels_per_frame": 78_400,
    "max_pixels_per_frame": 602_112,
    "max_pixels_per_video": 4_816_896,
    "budget": "video",
}
"""Settings of the paper and its published code, under the names of eval.py."""
SCHEDULE = "wait-3"

TASKS = {
    "description": ("Video description", "their test videos of PE-Video"),
    "funqa": ("Video question answering", "FunQA, as the mean of its six sub-tasks"),
}
"""Titles, and what the paper's values were measured on."""

FIGURES = {
    ("description", "3B"): {
        "origin": (35.44, 42.36, 14.45, 29.18, 30.47, 53.21, 4.84),
        "batch": (30.86, 40.26, 13.64, 28.49, 34.12, 53.19, 4.93),
        "interleave": (20.08, 44.40, 14.41, 27.17, 34.95, 44.11, 2.84),
        "overlap": (26.32, 42.14, 12.78, 27.92, 32.29, 50.62, 4.48),
        "group": (12.52, 26.32, 7.42, 30.03, 27.37, 51.53, 4.56),
        "gap": (28.11, 40.42, 11.52, 29.13, 30.69, 51.20, 4.85),
    },
    ("description", "7B"): {
        "origin": (42.42, 40.43, 12.46, 27.79, 32.72, 53.06),
        "batch": (38.13, 39.58, 11.97, 27.20, 31.58, 52.63),
        "interleave": (46.94, 49.02, 16.13, 32.24, 36.29, 44.78),
        "overlap": (47.49, 43.85, 12.10, 28.05, 31.86, 51.71),
        "group": (37.78, 41.01, 11.25, 27.48, 30.52, 51.18),
        "gap": (25.70, 39.09, 9.85, 28.71, 28.82, 51.16),
    },
    ("funqa", "3B"): {
        "origin": (6.98, 34.47, 4.74, 19.67, 22.43, 41.34, 4.70),
        "batch": (7.25, 35.23, 5.13, 19.50, 22.98, 42.04, 4.52),
        "interleave": (3.00, 21.95, 1.71, 13.03, 18.00, 31.22, 3.72),
        "overlap": (4.22, 33.40, 3.68, 20.23, 19.61, 37.38, 3.98),
        "group": (3.22, 31.32, 3.32, 21.82, 18.96, 41.16, 4.13),
        "gap": (3.99, 30.95, 2.48, 17.58, 19.33, 37.25, 4.61),
    },
}
"""By task and size, then by variant. Shorter rows lack the last metrics."""

RANDOM_METRIC, RANDOM_SIZE = "BLEURT", "3B"
RANDOM = {
    "fixed": {"interleave": 44.11, "overlap": 50.62, "group": 51.53, "gap": 51.20},
    "random": {"interleave": 40.56, "overlap": 50.71, "group": 51.76, "gap": 51.56},
}
"""Trained with K = 3 and evaluated with other schedules: PE-Video, BLEURT only."""


def figure(task: str, size: str, variant: str, metric: str) -> float | None:
    """The paper's value, or None if it gives none."""
    row = FIGURES.get((task, size), {}).get(variant, ())
    return dict(zip(METRICS, row, strict=False)).get(metric)
