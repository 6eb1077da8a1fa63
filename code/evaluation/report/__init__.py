"""A report on result files: tables and charts beside the paper's values, and captions beside the video."""
