"""What can go wrong in the library of methods.

SparseMethodError
├── UnknownMethodError     no method of this name                (also a ValueError)
├── UnknownVersionError    the method exists, this version not   (also a ValueError)
├── InvalidKnobsError      a knob is unknown or out of bounds     (also a ValueError)
└── UnsupportedError       a method was asked for what it declares it cannot do
"""


class SparseMethodError(Exception):
    """Base of every error raised by ``sparse_methods``."""


class UnknownMethodError(SparseMethodError, ValueError):
    """No method of this name is registered."""


class UnknownVersionError(SparseMethodError, ValueError):
    """The method is registered, but not in this version."""


class InvalidKnobsError(SparseMethodError, ValueError):
    """A knob is unknown, of the wrong type or outside its bounds.

    Attributes:
        knob: Name of the first knob at fault; empty if the knobs as a whole are wrong.
    """

    def __init__(self, message: str, knob: str = "") -> None:
        super().__init__(message)
        self.knob = knob


class UnsupportedError(SparseMethodError, ValueError):
    """The method declares that it cannot serve this model or geometry."""
