"""What can be wrong with a request or a checkpoint, in words that its sender may see."""


class InvalidInput(ValueError):
    """The request cannot be served as it is; the message names the input, the limit, the remedy."""


class Overloaded(RuntimeError):
    """The request cannot be served now, or not in time; the message says what it would wait for."""


class InvalidOutput(ArithmeticError):
    """The graph's answer cannot be ranked: it holds NaN or infinity."""


class UnsupportedCheckpoint(ValueError):
    """The checkpoint cannot be exported; the message names what is not known or not there."""


class ExportRefused(RuntimeError):
    """What was exported is not what the checkpoint's publisher runs, or cannot be written."""


class UnsupportedGraph(RuntimeError):
    """The graph has an operator that this processor has no kernel for."""
