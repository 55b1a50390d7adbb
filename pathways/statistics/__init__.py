"""Routing statistics: what the trainer counted, as Parquet tables that can be asked. See docs/statistics.md."""
