"""How a batch becomes problems (floor 5).

In reading order: arrangement (anchors, sets of candidates, positives), cancellation (false negatives the caller knows
of), detection (those that similarity finds), queue (past keys), distributed (candidates of all ranks), ring (those of
one other rank at a time), ring_stats, ring_ranked and ring_sums (statistics over what comes round).
"""
