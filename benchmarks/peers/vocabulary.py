"""A made-up vocabulary that both servers of benchmarks.servers are given. Only the standard library is imported.

Requests name tokens by number, so nothing is ever split into tokens; the words only have to come back as text.
"""

SPACE = "Ġ"  # a space, as byte-level vocabularies write it


def words(size: int) -> list[str]:
    """One word a token, all different, in plain ASCII: no answer waits for the rest of a character."""
    return [f"{SPACE}{i:x}" for i in range(size)]
