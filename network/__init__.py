"""Which addresses may be reached, and how names become addresses."""
