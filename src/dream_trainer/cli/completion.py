"""``completion``: the shell functions that complete command lines, and what they ask."""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path

_HELP = "print what bash or zsh needs to complete this program's words"
_LINE, _BREAKS = "DREAM_TRAINER_COMPLETION_LINE", "DREAM_TRAINER_COMPLETION_BREAKS"
_UNFINISHED = (".", ":", "/", "=")

_BASH = """\
# Completion of dream-trainer for bash. To be sourced: source <(dream-trainer completion bash)
_dream_trainer_before=()

_dream_trainer() {
    local program=dream-trainer answer word kind=
    # One that is called by its path need not be on PATH.
    [[ $1 == */dream-trainer ]] && program=${1/#\\~/$HOME}
    COMPREPLY=()
    while IFS= read -r word; do
        if [[ -z $kind ]]; then kind=$word; else COMPREPLY+=("$word"); fi
    done < <(DREAM_TRAINER_COMPLETION_LINE=${COMP_LINE:0:COMP_POINT} \\
        DREAM_TRAINER_COMPLETION_BREAKS=$COMP_WORDBREAKS \\
        command "$program" completion bash --candidates 2>/dev/null)
    case $kind in
        words) compopt +o default 2>/dev/null ;;
        open) compopt +o default -o nospace 2>/dev/null ;;
        files) compopt -o default 2>/dev/null ;;
        *) _dream_trainer_other "$@" ;;
    esac
}

# A command line of another program: to whoever completed it before.
_dream_trainer_other() {
    local name=${1##*/} before
    for before in ${_dream_trainer_before[@]+"${_dream_trainer_before[@]}"}; do
        if [[ ${before%% *} == "$name" ]]; then
            ${before#* } "$@"
            return
        fi
    done
    # bash-completion has a function for python, and loads it when it is first needed.
    if declare -F _comp_load >/dev/null; then _comp_load "$name" >/dev/null 2>&1
    elif declare -F _completion_loader >/dev/null; then _completion_loader "$name" >/dev/null 2>&1
    fi
    before=$(_dream_trainer_function "$name")
    complete -o default -F _dream_trainer "$name"
    [[ -n $before ]] || return
    _dream_trainer_before+=("$name $before")
    "$before" "$@"
}

# The function that completes a program, if another than ours does.
_dream_trainer_function() {
    local words
    read -ra words <<<"$(complete -p "$1" 2>/dev/null)"
    while ((${#words[@]} > 1)); do
        if [[ ${words[0]} == -F && ${words[1]} != _dream_trainer ]]; then
            printf '%s' "${words[1]}"
            return
        fi
        words=("${words[@]:1}")
    done
}

for _dream_trainer_name in PROGRAMS; do
    _dream_trainer_found=$(_dream_trainer_function "$_dream_trainer_name")
    if [[ -n $_dream_trainer_found ]]; then
        _dream_trainer_before+=("$_dream_trainer_name $_dream_trainer_found")
    fi
    complete -o default -F _dream_trainer "$_dream_trainer_name"
done
unset _dream_trainer_name _dream_trainer_found
"""

_ZSH = """\
# Completion of dream-trainer for zsh. To be sourced: source <(dream-trainer completion zsh)
if ! (( $+functions[compdef] )); then
    autoload -Uz compinit && compinit
fi
typeset -gA _dream_trainer_before

_dream_trainer() {
    local program=dream-trainer name=${words[1]:t} line
    # One that is called by its path need not be on PATH.
    [[ $words[1] == */dream-trainer ]] && program=${~words[1]}
    local -a answer closed open closed_help open_help
    answer=("${(@f)$(DREAM_TRAINER_COMPLETION_LINE="${(j: :)words[1,CURRENT-1]} $PREFIX" \\
        command $program completion zsh --candidates 2>/dev/null)}")
    for line in "${(@)answer[2,-1]}"; do
        # A value, a tab, and either nothing or what it is about.
        if [[ ${line%%$'\\t'*} == *[.:/=] ]]; then
            open+=("${line%%$'\\t'*}") open_help+=("${line/$'\\t'/  }")
        else
            closed+=("${line%%$'\\t'*}") closed_help+=("${line/$'\\t'/  }")
        fi
    done
    case $answer[1] in
        words | open | files) ;;
        *)
            if [[ -n $_dream_trainer_before[$name] ]]; then
                ${=_dream_trainer_before[$name]}
            else
                _default
            fi
            return
            ;;
    esac
    local found=1
    (( $#closed )) && compadd -l -d closed_help -a closed && found=0
    (( $#open )) && compadd -S '' -l -d open_help -a open && found=0
    [[ $answer[1] == files ]] && _files && found=0
    return found
}

for _dream_trainer_name in PROGRAMS; do
    if [[ ${_comps[$_dream_trainer_name]:-_dream_trainer} != _dream_trainer ]]; then
        _dream_trainer_before[$_dream_trainer_name]=$_comps[$_dream_trainer_name]
    fi
    compdef _dream_trainer $_dream_trainer_name
done
unset _dream_trainer_name
"""
_SCRIPTS = {"bash": _BASH, "zsh": _ZSH}


def add_completion_command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], prog: str
) -> None:
    """Add the parser of ``completion`` to those of the other commands."""
    parser = commands.add_parser(
        "completion",
        prog=f"{prog} completion",
        help=_HELP,
        description=_HELP,
        epilog=f"In the shell's start-up file: source <({prog} completion bash)",
        allow_abbrev=False,
    )
    parser.add_argument("shell", choices=tuple(_SCRIPTS))
    parser.add_argument(
        "programs",
        metavar="PROGRAM",
        nargs="*",
        help="complete also what these start: python, torchrun, or a script like train.py",
    )
    parser.add_argument("--candidates", action="store_true", help=argparse.SUPPRESS)


def completion(given: argparse.Namespace) -> None:
    """Run ``completion`` with what its parser read: the script, or what the script asks for."""
    if given.candidates:
        print("\n".join(_answer(given.shell, os.environ.get(_LINE, ""), Path.cwd())))
        return
    names = " ".join(shlex.quote(name) for name in ("dream-trainer", *given.programs))
    print(_SCRIPTS[given.shell].replace("PROGRAMS", names), end="")


def _answer(shell: str, line: str, folder: Path) -> list[str]:
    """What kind of answer it is, and the words, as one line each."""
    # Here, because the script itself can be printed without it.
    from dream_trainer.cli.candidates import candidates

    words = split_line(line)
    found = candidates(words, folder)
    if not found.ours:
        return ["other"]
    kind = "files" if found.files else "words"
    if shell == "zsh":
        return [kind, *(f"{word}\t{text}".rstrip() for word, text in found.words.items())]
    if any(word.endswith(_UNFINISHED) for word in found.words):
        kind = "open"
    # bash replaces what follows the last of these signs alone.
    breaks = os.environ.get(_BREAKS, "")
    start = max((words[-1].rfind(sign) for sign in breaks if sign in ":="), default=-1) + 1
    return [kind, *(_quoted(word[start:]) for word in found.words)]


def split_line(line: str) -> list[str]:
    """The words of a command line up to the cursor; the last one is empty behind a space."""
    for closing in ("", "'", '"'):
        try:
            words = shlex.split(line + closing)
        except ValueError:
            continue
        behind_space = not closing and line[-1:].isspace() and not line.endswith("\\ ")
        return [*words, ""] if behind_space or not words else words
    return [line]


def _quoted(word: str) -> str:
    plain = all(sign.isalnum() or sign in "-_./:=,+@%" for sign in word)
    return word if plain else shlex.quote(word)
