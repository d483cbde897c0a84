"""What can be wrong with a request, in words that a client may see."""


class InvalidInput(ValueError):
    """The request cannot be served as it is; the message names the input, the limit, the remedy."""


class InvalidOutput(ArithmeticError):
    """The graph's answer cannot be ranked: it holds NaN or infinity."""
