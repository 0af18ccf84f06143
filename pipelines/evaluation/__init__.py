"""Judging a version: suites, metrics, report."""
