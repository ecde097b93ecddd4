"""What a run leaves: results.json and scores.parquet for scripts, report.html and report.md for people."""
