"""The terminal app: a program of its own that talks HTTP to a chat server; it imports nothing of ``glmlocal``."""
