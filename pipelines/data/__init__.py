"""Rows: from sources to a clean, split, tokenised data set."""
