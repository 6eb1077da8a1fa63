"""The idea: the order in which video and text enter the model, their positions, who attends to whom, and what is
learned. Knows nothing of files, devices and models."""
