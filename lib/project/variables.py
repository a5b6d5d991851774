"""The variables of make's command line: which sentence answers one that it does not have, what each means to a run, and
how one that holds several words becomes arguments.

The Makefile lists the variables, and starts this file as a script, with whatever Python there is: what an environment
provides is imported where it is used. No value is ever read by a shell.
"""

import difflib
import os
import shlex
import sys

# The flags of the released scripts, and the fields of their files' names, if they have another name here.
RELEASED = {"NON_LIN": "ACTIVATION", "USE_BN": "BATCH_NORM", "LEARNING_RATE": "LR"}
# Parameters of the notebook train_cifar that are not the variable's name in small letters.
PARAMETERS = {"LR": "learning_rate"}
# The released command's flag, whose values have another name here.
SMOOTH_INIT = {True: "weight-tied", False: "iid"}


def unknown(name, known):
    """The sentence, without its full stop, for a variable that is none of the ``known``: it names the one that was
    meant, or lists all."""
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


def values(given):
    """The values of train_cifar's parameters in ``["DEPTH=256", "LR=4e-2", ...]``, by the names of the parameters.

    SMOOTH_INIT=True and INITIALISATION=weight-tied mean the same, and so do False and iid. Raises
    parameters.WrongParameters for an empty value, one that is not YAML, or two that contradict each other.
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
    """Become the command, with the words in ``before`` in front of it and those in ``after`` behind it.

    Quotes hold words together as in a shell, and nothing else in them means anything. ``name`` is the variable that
    holds them, for the sentence if that is not possible; then a status is returned.
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
        print(unknown(sys.argv[2], sys.argv[3:]))
    else:
        sys.exit(run(*sys.argv[2:5], sys.argv[5:]))
