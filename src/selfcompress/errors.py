"""Everything this package raises on purpose.

```
SelfcompressError
├── UsageError (ValueError)        a call, an option or a model that cannot work, with what to do instead
│   └── CallOrderError             the right calls in the wrong order
├── DataError (ValueError)         a data folder or file that is missing, foreign or damaged
├── FormatError (ValueError)       a `.scn` file that is truncated, altered, foreign or for another model
├── CheckpointError (ValueError)   a training checkpoint that does not fit
├── ExportError (RuntimeError)     an export that does not compute what it was made from
├── NonFiniteError (ArithmeticError)  NaN or infinity in the loss or in a parameter
└── OutputError (OSError)          a place that cannot be written
```

A message says where, what was found and what was expected; a line that starts with `hint:` says what to do.
The command line prints the message without a traceback and exits with code 2.
"""


class SelfcompressError(Exception):
    """Base of all errors that selfcompress raises on purpose."""


class UsageError(SelfcompressError, ValueError):
    """A call, an option or a model that cannot work."""


class CallOrderError(UsageError):
    """The right calls in the wrong order."""


class DataError(SelfcompressError, ValueError):
    """A data folder or file that is missing, foreign or damaged."""


class FormatError(SelfcompressError, ValueError):
    """A `.scn` file that is truncated, altered, foreign, or made for another model."""


class CheckpointError(SelfcompressError, ValueError):
    """A training checkpoint that does not fit the model or the optimizer."""


class NonFiniteError(SelfcompressError, ArithmeticError):
    """NaN or infinity in the loss or in a parameter."""


class ExportError(SelfcompressError, RuntimeError):
    """An exported network that does not compute what it was made from."""


class OutputError(SelfcompressError, OSError):
    """A file or folder that cannot be written."""
