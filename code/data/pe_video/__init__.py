"""PE-Video as the hub holds it, read, filtered and written as the rows that training and evaluation use.

Everything but the command line, which is mani_data.py at the project's root. Rows flow one way:
sources (with tar, gz, hub) -> rules -> stages (with merge) -> report; what FunQA shares is in `preparation`. Does not
depend on the model.
"""
