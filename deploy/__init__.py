"""How Deltaworks is run: the embedded stack of `make run`, container files and the demo's material."""
