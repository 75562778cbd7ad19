"""The terminal app, a program of its own that talks HTTP to a server; `glmlocal chat` is the plain mode until then."""
