"""In and out: weights of other programs, and ours for them. Nothing here is needed to train or to sample."""
