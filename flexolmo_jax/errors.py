"""The one family of errors that the command line turns into one line."""


class UserError(Exception):
    """Bad input: the message names the file or flag, what is wrong, and what would be right.

    Raise it for anything a user can mend (a flag, a file, a configuration key). The command line prints
    it on standard error, without a traceback, and exits with status 2.
    """
