"""Prepares PE-Video: reads it as published, filters it, and writes the rows that training and evaluation use.

Contains everything but the command line, which is mani_data.py at the project's root. `sources` (with `tar`,
`gzip_file` and `hub`) finds and reads samples, `stages` filters them and checks videos in worker processes, `merge`
combines their results, and `run` writes the files. What FunQA shares is in `preparation`. Does not depend on the model.
"""
