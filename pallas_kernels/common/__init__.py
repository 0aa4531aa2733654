"""Interfaces, checks and helpers that all operations share."""
