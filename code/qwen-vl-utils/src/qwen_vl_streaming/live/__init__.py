"""The command that watches a source and prints the answer: options, output, statistics."""
