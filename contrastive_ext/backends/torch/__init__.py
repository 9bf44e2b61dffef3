"""Plain PyTorch, block by block: any device, any shape.

row_stats streams; kept holds the one block of a small problem from forward to backward; ranked_stats weighs by rank.
"""
