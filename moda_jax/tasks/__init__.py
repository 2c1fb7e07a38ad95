"""What a run learns. The trainer, its evaluation, files, plots and replay know a `Task` and nothing of its data."""
