"""Every error a user can meet.

BMTrainError
├── NotInitializedError   something needs ``bmt.init_distributed()`` first            (RuntimeError)
├── ConfigurationError    arguments or sizes that cannot work together                (ValueError)
├── DeviceError           a device was asked for that this machine does not have      (RuntimeError)
├── CheckpointError       a checkpoint does not fit the model, or cannot be read      (RuntimeError)
├── ShardedAccessError    values of a sharded parameter were read or written in place (RuntimeError)
├── InPlaceError          what gradients need was changed in place                    (RuntimeError)
├── RankDivergenceError   ranks ran different blocks                                  (RuntimeError)
├── CommunicationError    a collective failed or was called with unfit tensors        (RuntimeError)
├── NonFiniteError        a loss or a gradient is infinite or NaN                     (FloatingPointError)
└── UnsupportedError      a feature that this version does not have                   (NotImplementedError)

Each also derives from the built-in exception in parentheses, so ``except ValueError`` keeps working.
"""


class BMTrainError(Exception):
    """Base of all errors raised on purpose by this library."""


class NotInitializedError(BMTrainError, RuntimeError):
    """``bmt.init_distributed()`` has not been called yet."""


class ConfigurationError(BMTrainError, ValueError):
    """Arguments, sizes or modules that cannot work together."""


class DeviceError(BMTrainError, RuntimeError):
    """A device was asked for that this process does not have."""


class CheckpointError(BMTrainError, RuntimeError):
    """A checkpoint does not fit the model or cannot be read."""


class ShardedAccessError(BMTrainError, RuntimeError):
    """The values of a sharded parameter were used where only its shape is known."""


class InPlaceError(BMTrainError, RuntimeError):
    """A tensor that gradients need has been changed in place since, of which torch says the same on one process."""


class RankDivergenceError(BMTrainError, RuntimeError):
    """The ranks ran different blocks, so their collectives no longer match."""


class CommunicationError(BMTrainError, RuntimeError):
    """A collective failed, or was called with tensors that do not fit it."""


class NonFiniteError(BMTrainError, FloatingPointError):
    """A loss or a gradient is infinite or NaN, so that the step would spoil every parameter."""


class UnsupportedError(BMTrainError, NotImplementedError):
    """A feature that this version does not have."""
