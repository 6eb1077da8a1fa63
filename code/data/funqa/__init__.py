"""Prepares FunQA (Xie et al., ECCV 2024): reads it as published, filters it, and writes one question per row.

Contains everything but the command line, which is mani_data.py at the project's root. `annotations` reads questions,
`sources` and `videos` find the videos, and `run` writes the files. What PE-Video shares is in `preparation`. Does not
depend on the model.
"""
