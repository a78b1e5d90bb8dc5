"""What stands for "no default"."""


class Missing:
    """Stands for "no default": then a missing secret raises."""


MISSING = Missing()
