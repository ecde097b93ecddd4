"""What a run, a scan or a sweep leaves: files for scripts, pages for people.

results.json, scores.parquet and suspects.csv are the contract with scripts; report.html, report.md and the plots are
rendered from files alone. Imports what stands before it in the line, up to `evaluation`. Begin with `results`, then
`page` (of a run), `scan` and `sweep`. Matplotlib, Arrow and Jinja are imported by the functions that need them: a
process that draws and writes nothing starts without.
"""
