"""Projections in SQLite: views derived from events and metadata, never the truth."""
