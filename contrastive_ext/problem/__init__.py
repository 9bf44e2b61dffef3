"""What a backend is asked, as plain data (floor 2).

In reading order: pairs (which pairs are negatives), problem (rows against columns, and what comes back), ranking
(weights by rank), schema (a problem as an operator's arguments), short_road (the two operators of a whole loss).
"""
