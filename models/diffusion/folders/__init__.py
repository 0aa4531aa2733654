"""Folders of published models: their layouts, and parts given by themselves."""
