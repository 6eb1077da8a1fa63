"""Metrics of captions: corpus metrics, BLEURT, an LLM judge, and lag. Knows nothing about the streaming model."""
