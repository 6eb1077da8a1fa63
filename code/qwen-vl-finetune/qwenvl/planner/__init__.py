"""Chooses how to train on given GPUs: ZeRO stage, packing, activation checkpointing, compilation, accumulation."""
