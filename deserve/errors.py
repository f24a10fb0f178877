"""Errors that a user can cause, each with one message that says what to do."""


class UserError(Exception):
    """A mistake in the configuration, the input or the model folder; the message names the key, file or line."""


class RequestError(Exception):
    """A request that cannot be answered; it becomes an `error` line of the results, the rest of the job runs.

    `code` is a short word for programs, the message is for people.
    """

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


class LinkError(Exception):
    """A rank that this one depends on is gone, or the link to it; the message names both."""
