"""What the tiles that find negatives can do for those who mine and evaluate (floor 7).

In reading order: mining (the most similar columns of every query), retrieval (where a query's positive ranks among all
columns), geometry (alignment and uniformity of an embedding).
"""
