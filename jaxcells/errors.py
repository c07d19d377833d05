"""The one base class of every failure that a user can cause and mend."""


class Error(Exception):
    """An expected failure: one line that says what was wrong, where, and what to do next.

    The command line prints the message and exits with code 2. Anything else that is raised is a
    bug in jaxcells and keeps its traceback.
    """
