"""What a run leaves for people and scripts: results.json, scores.parquet, report.md and two plots."""
