"""The one exception a user is meant to read."""


class StudyError(RuntimeError):
    """Something the user can mend; the message is one sentence: what happened, and what to do."""
