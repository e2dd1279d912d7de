"""The report of a benchmark, which is a folder of runs: what they found across the settings in which they differ."""
