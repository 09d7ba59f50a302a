"""`glidepath plan`: `planning` puts together what `counting`, `memory`, `speed` and `hardware` say."""
