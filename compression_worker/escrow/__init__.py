"""Lossless escrow: a fine-tuned checkpoint stored against its base, bit for bit, for a fraction of a second copy."""
