"""Result files as one page and one table: charts, captions beside videos, the paper's figures."""
