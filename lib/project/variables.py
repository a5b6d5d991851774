"""The variables of make's command line: the message for an unknown one, the value of each for a run, and the arguments
in a variable that holds several words.

The Makefile lists the variables, and starts this file as a script with any Python. So packages are imported only where
they are used. No value is ever read by a shell.
"""

import difflib
import os
import shlex
import sys

# Flags of the released scripts, and fields of their file names, that have another name here.
RELEASED = {"NON_LIN": "ACTIVATION", "USE_BN": "BATCH_NORM", "LEARNING_RATE": "LR"}
# Parameters of the notebook train_cifar whose name is not that of the variable in small letters.
PARAMETERS = {"LR": "learning_rate"}
# The values of a flag of the released command, by their names here.
SMOOTH_INIT = {True: "weight-tied", False: "iid"}


def explain_unknown(name, known):
    """The message, without its full stop, for a variable that is not ``known``: it names the one that was meant, or
    lists all."""
    there_is_none = f"There is no variable {name}"
    plain = name.upper().replace("-", "_")
    if plain in RELEASED and RELEASED[plain] in known:
        return f"{there_is_none}: here it is {RELEASED[plain]}"
    if plain in known:
        return f'{there_is_none}, but {plain} (and a parameter of a figure goes into SET="{name}=...")'
    near = difflib.get_close_matches(plain, known, n=1)
    if near:
        return f"{there_is_none}: did you mean {near[0]}?"
    return (
        f'{there_is_none}, but {", ".join(sorted(known))}. A parameter of a figure goes into SET="{name}=...", '
        f"a variable of the environment before the word make"
    )


def read_values(given):
    """The values of train_cifar's parameters in ``["DEPTH=256", "LR=4e-2", ...]``, by the names of the parameters.

    SMOOTH_INIT=True means INITIALISATION=weight-tied, and SMOOTH_INIT=False means iid. Raises
    parameters.WrongParameters if a value is empty or not YAML, or if two values contradict each other.
    """
    from lib.parameters import WrongParameters, read_value

    found = {}
    for variable, _, text in (one.partition("=") for one in given):
        if not text.strip():
            raise WrongParameters(f"{variable} is empty: give it a value, or leave it out.")
        value, parameter = read_value(variable, text), PARAMETERS.get(variable, variable.lower())
        if variable == "SMOOTH_INIT":
            if not isinstance(value, bool):
                raise WrongParameters(f"{variable} is {text!r}, expected True or False.")
            value, parameter = SMOOTH_INIT[value], "initialisation"
        if found.setdefault(parameter, value) != value:
            raise WrongParameters(
                f"{parameter} is {found[parameter]!r} and {value!r} at the same time: {' '.join(given)}."
            )
    return found


def run(name, before, after, command):
    """Replace this process by the command, with the words in ``before`` before it and those in ``after`` after it.

    Quotes hold words together as in a shell; no other character has a meaning. ``name`` is the variable that holds the
    words. If the command cannot be run, prints a message with this name and returns a status.
    """
    try:
        command = [*shlex.split(before), *command, *shlex.split(after)]
    except ValueError as error:
        print(f"{name} is {before or after!r}: {str(error).lower()}.", file=sys.stderr)
        return 2
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"{name} is {before or after!r}: {command[0]} cannot be run ({error.strerror}).", file=sys.stderr)
        return 127


if __name__ == "__main__":
    if sys.argv[1] == "unknown":
        print(explain_unknown(sys.argv[2], sys.argv[3:]))
    else:
        sys.exit(run(*sys.argv[2:5], sys.argv[5:]))
