"""What the preparation of every data set shares: files, workers, rules, token counts, videos, the report."""
