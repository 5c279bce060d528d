# SPDX-License-Identifier: Apache-2.0
"""Failures that an operator has to see to, one class for each kind."""


class ConfigurationError(Exception):
    """Something outside the program keeps it from starting.

    :param message: what is wrong, naming the file, option or peer.
    :param way_out: what the operator can do about it.
    """

    def __init__(self, message: str, way_out: str) -> None:
        super().__init__(message)
        self.way_out = way_out


class EngineError(ConfigurationError):
    """The scan engine of the configuration cannot be had."""


class JournalError(ConfigurationError):
    """The alert journal cannot be opened."""


class PrivilegeError(ConfigurationError):
    """The worker cannot become what it is to be."""


class RegistrationError(ConfigurationError):
    """An instance's registration cannot be placed or read."""


class RecordingError(ConfigurationError):
    """A recording cannot be read or written, or nobody plays it."""


class RuleError(ConfigurationError):
    """The rules cannot be read or compiled."""


class SocketError(ConfigurationError):
    """The socket cannot be listened on."""


class StatusError(ConfigurationError):
    """The worker cannot be asked how it is."""
