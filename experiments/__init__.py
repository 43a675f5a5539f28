"""Experiments: one short module a scenario, all run by one runner."""
