"""The measurements of `latency.py` and their plots."""
