"""Errors that are the user's to mend: the command line prints their message alone and exits with code 2."""


class UserError(ValueError):
    """Says what was given, what is valid and what to do."""
