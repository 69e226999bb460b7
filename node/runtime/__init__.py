"""Model runtimes behind the `Backend` port. `engine/` is torch and nothing of ours; the rest adapts it."""
