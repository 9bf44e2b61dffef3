"""The streaming operators with their autograd formulas (floor 4); a backend does the arithmetic.

In reading order: row_stats (log-sum-exps over negatives), ranked_stats (weighted by rank), pair_sums (sums of softplus
over pairs), top_columns (the k most similar columns), whole_loss (the short road: a built-in loss as one operator).
What the first three share:
problem_checks, problem_call (a problem as arguments of an operator), registration (operators of torch).
"""
