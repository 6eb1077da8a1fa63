"""The measurements of `weights.py`."""
