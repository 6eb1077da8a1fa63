"""Shared by the preparation of every data set behind mani_data.py.

A data set's own package (`pe_video`, `funqa`) finds its samples and writes its rows. This package holds what does not
depend on the data set: run options and output files (`run`), filtering rules (`rules`), token counts (`tokens`), video
checks that resume (`videos`, `inspection`), hub access (`hub`), worker processes (`parallel`), atomic files (`files`)
and statistics (`report`). Data of one's own needs no package: rows are filtered by `own_rows`, and captions with times
in published shapes become rows in `timed_rows` (`timed_formats`, `subtitles`). Does not depend on the model.
"""
