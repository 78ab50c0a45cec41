"""The one exception that a user of the command line can mend."""


class UserError(ValueError):
    """A mistake in a flag, a file or a dataset: what was got, what was expected, and which flag or file it is about.

    The command line prints it as one line on stderr and exits with code 2; everything else is a bug and keeps its
    traceback. It derives from ``ValueError``, so that library callers can catch the built-in class.
    """
