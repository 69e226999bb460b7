"""The worker: admission, serving, channels, claims. One stream is one task; money goes through the channel book."""
