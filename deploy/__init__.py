"""Answers requests: engine, gateway, routing, recording."""
