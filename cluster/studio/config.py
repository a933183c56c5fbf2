"""The settings of the studio."""

from __future__ import annotations

from dataclasses import dataclass

from bld_core.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """The studio: the trained pair behind HTTP. The variable BLD_TOKEN, where it is set, is the bearer
    token that requests to /v1/ and /report must send.

    Args:
        host: address to listen on; 0.0.0.0 is all of this machine's, and then a token should be set.
        port: to listen on.
        min_replicas: fewest replicas, each of which holds the pair.
        max_replicas: most replicas; between the two, as many as the requests under way ask for.
        batch: images in one pass of the networks, of any users who ask with the same settings. Fewer are filled up: an
            image has the same bytes whoever else asks.
        wait: share of a pass's time for which nobody new must come before it begins without being full, in [0, 1].
        queue: images that a replica takes on; who asks for more is told to come again later.
        body_mb: largest request in MiB.
        watch: seconds between looks for a new champion.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    min_replicas: int = 1
    max_replicas: int = 1
    batch: int = 16
    wait: float = 0.1
    queue: int = 256
    body_mb: int = 8
    watch: float = 10.0

    def __post_init__(self) -> None:
        if not 0 < self.port < 1 << 16:
            raise UserError(f"serve.port is {self.port}; it must be from 1 to {(1 << 16) - 1}")
        if not 1 <= self.min_replicas <= self.max_replicas:
            raise UserError(
                f"serve.min_replicas is {self.min_replicas} and serve.max_replicas {self.max_replicas}; they must be "
                "at least 1, and the first not above the second"
            )
        if self.batch < 1:
            raise UserError(f"serve.batch is {self.batch}; it must be at least 1")
        if not 0 <= self.wait <= 1:
            raise UserError(f"serve.wait is {self.wait}; it must lie in [0, 1]")
        if self.queue < MOST_IMAGES:
            raise UserError(f"serve.queue is {self.queue}; one request may ask for {MOST_IMAGES} images: at least that")
        if self.body_mb < 1:
            raise UserError(f"serve.body_mb is {self.body_mb}; it must be at least 1")
        if not self.watch > 0:
            raise UserError(f"serve.watch is {self.watch}; it must be above 0 seconds")


MOST_IMAGES = 64
"""Images that one request may ask for."""
