"""llama.cpp's own HTTP server, as a peer of our tests: `build/llamacpp/bin/python scripts/peers/llamacpp_server.py MODEL.gguf`.

Prints its address as one line on stdout, then serves until stdin ends. Runs in an environment of its own
(`scripts/setup-peers llamacpp`): nothing of it is a dependency of the product.
"""

from __future__ import annotations

import sys

import xllamacpp


def main(path: str, slots: int = 4) -> None:
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.model_alias = {"smollm2"}
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.n_ctx = 2048 * slots
    params.n_parallel = slots
    params.n_gpu_layers = 0
    params.endpoint_metrics = True
    params.warmup = False
    params.offline = True
    params.ui = False
    params.verbosity = -1
    params.cpuparams.n_threads = 1
    params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1])
