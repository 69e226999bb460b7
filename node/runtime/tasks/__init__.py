"""Tasks beyond chat: a runner for each, behind `node.ports.TaskBackend`."""
