"""Reads events and tells what changed: windows, latency, cost, drift, alerts, console."""
