"""What `badloss bench` measures: one file a benchmark, each `(settings) -> figures` that JSON can hold."""
