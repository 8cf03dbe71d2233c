"""The errors a user can cause. Each names the key, the value it got and the remedy, and is raised before weights load."""


class ConfigError(ValueError):
    """A recipe, a data set or a model folder cannot be used as given. The command line prints it as one line and exits with 2."""


class TrainingError(RuntimeError):
    """A run that must not go on, such as a loss that is not finite. Raised on every rank."""
