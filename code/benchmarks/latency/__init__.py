"""What `latency.py` measures: rounds, delays, many sessions, and the plots of them."""
