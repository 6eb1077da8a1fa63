"""What an answer is worth: caption metrics, BLEURT, a judge, timeliness. Knows nothing of models and result
files."""
