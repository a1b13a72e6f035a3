"""What a call is, and its law: types, steps, retries, callbacks, views.  No file, socket or clock in it."""
