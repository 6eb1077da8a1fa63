"""Reproduces the paper's tables by running mani_data.py, sft.sh, eval.sh and report.py in order."""
