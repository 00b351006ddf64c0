"""Money, energy, and how large a batch still pays.

Money is devices x hours x price, energy devices x hours x the device's rated power (an upper bound, and
without cooling). A batch of B sequences needs E = E_min (1 + B / B_crit) tokens for the same loss
(McCandlish 2018, arXiv 1812.06162); its critical size for AdamW on D tokens is 22.91 (D / 10^6)^0.47
sequences of 512 tokens (Zhang 2024, arXiv 2410.21676: 20% more steps than with small batches).
"""

import tomllib
from functools import lru_cache
from pathlib import Path

FILE = Path(__file__).with_name("prices.toml")


@lru_cache(1)
def dated_prices() -> tuple[str, dict[str, float]]:
    """(date, US dollars per hour by device name)."""
    raw = tomllib.loads(FILE.read_text())
    return raw["date"], raw["usd_per_hour"]


def critical_batch_tokens(tokens: float) -> float:
    """The batch, in tokens, beyond which doubling it saves less than it costs, for `tokens` in all."""
    return 22.91 * (tokens / 1e6) ** 0.47 * 512


def token_cost(batch_tokens: float, critical_tokens: float) -> float:
    """Tokens that this batch needs, relative to a very small one, for the same loss."""
    return 1 + batch_tokens / critical_tokens
