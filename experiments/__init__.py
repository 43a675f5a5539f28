"""Experiments: one short module per scenario, all run by one runner."""
