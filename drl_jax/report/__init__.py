"""The report of a run: one HTML page that shows what an evaluation found."""
