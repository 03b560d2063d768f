"""Errors that a person can act on: found, expected, what to do, in one sentence.

Jobs turn the input errors into exit code 2 and everything else into 1.
"""


class InputError(Exception):
    """Something that the user gave (config, data, credentials, a file) cannot be used; jobs exit with 2."""


class ConfigError(InputError):
    """A config value is impossible; the message begins with the dotted name of the field."""


class DataError(InputError):
    """A release, manifest, shard or score table is not what it should be."""


class RunError(Exception):
    """The job failed after its input was accepted (NaN loss, too many corrupt images, a lost stream); jobs exit with 1."""


class RunFaultError(Exception):
    """A fault of the run itself that all ranks see alike: trying again would meet it again."""
