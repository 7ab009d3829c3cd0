"""The error that a user can put right."""


class UsageError(ValueError):
    """Something the user gave or lacks; the program shows its one-line message and stops."""
