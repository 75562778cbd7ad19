"""The terminal app: a program of its own that talks HTTP and SSE to a chat server; it imports nothing of ``glmlocal``."""
