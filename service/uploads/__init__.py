"""Prompt files as they come in: JSONL, CSV, or Parquet → checked rows → one canonical JSONL.

Knows files and rows; knows nothing of HTTP, storage, or the database.
"""
