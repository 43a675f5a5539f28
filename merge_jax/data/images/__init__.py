"""Labelled image sets and their loaders."""
