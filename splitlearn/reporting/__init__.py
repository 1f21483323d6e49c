"""What the reports of lab and load test share: the style of charts, the shell of a page, files, percentiles."""
