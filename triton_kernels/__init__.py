"""Triton kernels, installed as `contrastive_ext.triton_kernels`; `contrastive_ext.backends.triton` is their door.

One concept per file, under the names csrc/ uses: scores (a tile of logits), pairs (which of them are negatives),
online_lse (log-sum-exp in four moves), softplus (what sums over pairs have instead), row_stats_forward and
row_stats_backward (one tile loop each), pair_sums, merge (partial results), prologue and row_losses (what the short
road has around them), histogram_ranks, top_columns, configs.
"""
