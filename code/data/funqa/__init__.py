"""FunQA as its authors publish it (Xie et al., ECCV 2024), read, filtered and written as rows with a question each.

Everything but the command line, which is mani_data.py at the project's root. Rows flow one way:
annotations, videos -> run. What it shares with PE-Video is in `preparation`. Does not depend on the model.
"""
