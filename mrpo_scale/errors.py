"""The errors a user can cause. Each names the key, the value it got and the remedy, and is raised before weights load."""


class ConfigError(ValueError):
    """A recipe, a data set or a model folder cannot be used as given. The command line prints it as one line and exits with 2."""
