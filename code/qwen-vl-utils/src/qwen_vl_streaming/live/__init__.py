"""How to watch a source on the terminal: options, the screen, statistics."""
