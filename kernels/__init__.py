"""Fast matrix code that knows nothing of ours."""
