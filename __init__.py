"""faashound: any program as an HTTP function, now or later; see README.md."""
