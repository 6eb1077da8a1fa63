"""The order in which video and text enter the model, their positions, attention and training targets, for each variant.
Knows nothing about files, devices and models."""
