"""Comparing methods: studies over configs and seeds, and their tables."""
