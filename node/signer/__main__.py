"""`python -m node.signer FD FD`: started by a node, with two inherited sockets, and by nobody else."""

from __future__ import annotations

import socket
import sys

from node.signer.process import main

if __name__ == "__main__":
    if len(sys.argv) != 3 or not all(one.isascii() and one.isdigit() for one in sys.argv[1:]):
        sys.exit("error: this is the signer of a node; a node starts it itself")
    line, identity = (socket.socket(fileno=int(one)) for one in sys.argv[1:])
    sys.exit(main(line, identity))
