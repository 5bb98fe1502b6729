"""When requests are sent.

Open loop: at times of their own, whatever the server does. Closed loop: N clients, each sending its next request when
its last one is answered. All times are seconds from the start.
"""

import math
import random
from dataclasses import dataclass

from server.bench.errors import BenchError


@dataclass(frozen=True)
class Arrivals:
    """Sending times of an open loop, or the clients of a closed one.

    rate        requests a second on average; None: a closed loop
    burstiness  shape of the gamma-distributed gaps: 1 is a Poisson process, less comes in bursts, more is steadier, and
                infinity is one request every 1 / rate seconds
    ramp_from   the rate grows from this one to `rate`, evenly over the requests; None: it does not
    clients     most requests in flight; None: any number
    """

    rate: float | None = None
    burstiness: float = 1.0
    ramp_from: float | None = None
    clients: int | None = None

    def __post_init__(self) -> None:
        if self.rate is None and self.clients is None:
            raise BenchError("state --rate, or --clients for a closed loop")
        for name, value in (("rate", self.rate), ("burstiness", self.burstiness), ("ramp", self.ramp_from)):
            if value is not None and not value > 0:
                raise BenchError(f"--{name} must be above 0, found {value:g}")
        if self.clients is not None and self.clients < 1:
            raise BenchError(f"--clients must be at least 1, found {self.clients}")
        if self.rate is None and self.ramp_from is not None:
            raise BenchError("--ramp needs the --rate it leads to")
        if self.rate is None and self.burstiness != 1.0:
            raise BenchError("--burstiness is of requests at a --rate; the clients of a closed loop set their own pace")

    def times(self, count: int, seed: int) -> list[float]:
        """Sending times of `count` requests, ascending; all 0 in a closed loop, where clients set the pace."""
        if self.rate is None:
            return [0.0] * count
        rng = random.Random(seed)
        now, times = 0.0, []
        for index in range(count):
            times.append(now)
            share = index / max(1, count - 1)
            rate = self.rate if self.ramp_from is None else self.ramp_from + share * (self.rate - self.ramp_from)
            now += self._gap(rng) / rate
        return times

    def describe(self) -> str:
        limit = "" if self.clients is None else f", at most {self.clients} in flight"
        if self.rate is None:
            return f"{self.clients} clients, each sending when its last request is answered"
        ramp = "" if self.ramp_from is None else f"{self.ramp_from:g} to "
        kind = {1.0: "Poisson", math.inf: "evenly spaced"}.get(
            self.burstiness, f"gamma, burstiness {self.burstiness:g}"
        )
        return f"{ramp}{self.rate:g} requests a second, {kind}{limit}"

    def _gap(self, rng: random.Random) -> float:
        """With a mean of 1."""
        if math.isinf(self.burstiness):
            return 1.0
        return rng.gammavariate(self.burstiness, 1 / self.burstiness)
