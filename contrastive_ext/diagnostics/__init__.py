"""What can be asked about a call without making it (beside floor 6).

explain (which backend, and why not the others), memory (how much it takes), tuning (tile sizes timed on request).
"""
