"""Ports of this machine for servers of tests."""

import random
import socket

# Below those that the kernel hands out, and above those of Ray's workers: no other program takes one by chance.
RANGE = range(20_000, 32_000)


def free_port() -> int:
    """A port at which no program listens."""
    draw = random.SystemRandom()
    while True:
        port = draw.choice(RANGE)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
