"""The search: space, trials, workers."""
