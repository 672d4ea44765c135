"""Every read that a page needs, in few queries."""
