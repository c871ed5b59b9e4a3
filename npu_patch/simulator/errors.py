"""What the simulator raises."""


class SimulatorError(RuntimeError):
    """The simulated NPU cannot be started. The message is one line: what is wrong, the value, and what to do."""


class Refused(RuntimeError):
    """An operator was called in a way that its documentation does not allow.

    The message starts with the operator's name and states the rule that was broken and the offending value.
    """
