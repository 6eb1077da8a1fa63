"""Benchmarks from outside: their data as our rows, and our captions in their layout. Knows nothing about models."""
