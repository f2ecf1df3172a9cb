"""The errors a user can meet, each with the exit code of the command line.

Every error carries one readable paragraph as its only argument: what is wrong, where, and what to
do. One positional argument on purpose: worker processes send exceptions back by pickling ``args``,
and an ``__init__`` with more than one required argument cannot be rebuilt on the other side.
"""


class CamoXpertError(Exception):
    """Base of all expected errors; the command line prints its text without a traceback."""

    exit_code = 1
    # Set if another rank of the same run prints it.
    quiet = False


class ConfigError(CamoXpertError):
    """A flag, a config file or an override is wrong or contradicts another."""

    exit_code = 2


class DataError(CamoXpertError):
    """A data set, an image or a mask is missing, unreadable or not what it claims to be."""

    exit_code = 3


class CheckpointError(CamoXpertError):
    """A checkpoint or weight file is missing, damaged or does not fit the model."""

    exit_code = 4


class NumericError(CamoXpertError):
    """Training met a non-finite loss or gradient that it could not skip, or a network's output is
    not finite."""

    exit_code = 5


class PeerError(CamoXpertError):
    """Another process of a distributed run ended or does not answer."""

    exit_code = 6


class Stopped(BaseException):
    """The command was asked to stop and left its work in order; the same command continues it.

    Like KeyboardInterrupt not an ``Exception``: a signal can raise it anywhere, and code that turns
    any failure to read a file into another error must not swallow it.

    ``exit_code`` is 75 (deadline), 130 (Ctrl-C), 143 (SIGTERM) or 129 (SIGHUP), set on the
    instance.
    """

    exit_code = 75
    # Set if another rank of the same run prints it.
    quiet = False
