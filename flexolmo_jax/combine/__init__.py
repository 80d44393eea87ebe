"""Combining an anchor and contributions into one model, and leaving it again."""
