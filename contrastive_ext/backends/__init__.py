"""One module per backend: each computes the row statistics of one `Problem` and their gradient (see dispatch.py)."""
