"""What the outputs say about all steps together: which are done, and which contradict the plan or each other."""

from qwen_vl_streaming.common.errors import InputError

from .checks import REFUSED, State
from .steps import Step


def find_states(steps: list[Step]) -> dict[str, State]:
    """What the outputs say about each step, by its name.

    Where outputs contradict the plan, or each other within a table, the steps of that task and size are refused, and
    the others are not affected. Raises InputError, in one line, where the data contradict the plan, or nothing is left.
    """
    states: dict[str, State] = {}
    first: dict[tuple, str] = {}
    refused: dict[str, str] = {}
    for step in steps:
        try:
            states[step.name] = check_step(step, states, first)
        except InputError as error:
            if not step.part:
                raise
            refused.setdefault(step.part, str(error))
            states[step.name] = State(REFUSED, str(error))
    if refused and all(step.part in refused for step in steps if step.part):
        raise InputError(next(iter(refused.values())))
    for step in steps:
        if step.part in refused and states[step.name].word != REFUSED:
            states[step.name] = State(REFUSED, f"as all of {step.part}")
    return states


def refusals(steps: list[Step], states: dict[str, State]) -> list[str]:
    """A line for each task of a size that is refused, with the reason."""
    lines: dict[str, str] = {}
    for step in steps:
        if states[step.name].word == REFUSED and states[step.name].detail != f"as all of {step.part}":
            lines.setdefault(step.part, f"{step.part} is refused: {states[step.name].detail}")
    return list(lines.values())


def check_step(step: Step, states: dict[str, State], first: dict[tuple, str]) -> State:
    """What the output of one step says. `first` has the first step of each table that has facts. Raises InputError."""
    state = step.check()
    if not state.facts:
        return state
    other = first.setdefault(step.table, step.name)
    known = state.facts if other == step.name else states[other].facts
    for fact, value in state.facts.items():
        if fact in known and known[fact] != value:
            raise InputError(
                f"{step.name} and {other} do not belong in one table: {fact} is {value} and {known.get(fact)}: move "
                f"away the output of one of them ({state.where}), or give another --output"
            )
    return state
