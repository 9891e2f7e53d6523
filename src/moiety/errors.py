"""The one exception that is the user's to mend: the command line prints it and exits with 2."""


class InputError(ValueError):
    """Bad input or usage. The message names the file, the item and the remedy."""
