"""`fastddim export` as it was before each runtime had a command of its own: such a line in today's words."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

_RENAMED = {"--graph": "--kind", "--trt": "--flavour", "--triton-name": "--name"}
_OF_REPOSITORIES = {
    "--triton-name", "--max-batch-size", "--preferred-batch-sizes", "--queue-delay", "--queue-timeout",
    "--timeout-action", "--queue-size", "--instances", "--instance-kind", "--gpus", "--warmup", "--backend-parameter",
    "--accelerator", "--accelerator-parameter", "--model-versions",
}  # fmt: skip
_OF_KERNELS = {"--noise": ["--noise", "given"], "--draw-noise": ["--noise", "drawn"]}


def new_spelling(arguments: Sequence[str]) -> str:
    """The line for a shell that does what `fastddim export` with these arguments did."""
    given: list[list[str]] = []
    for argument in arguments:
        if argument.startswith("--"):
            option, joined, value = argument.partition("=")
            given.append([option, value] if joined else [option])
        elif given:
            given[-1].append(argument)
    taken = {
        words[0]: words[-1]
        for words in given
        if words[0] in ("--format", "--model", "--from", "--verify", "--triton-repository", "--out")
    }
    runtime, out, repository = taken.get("--format", "onnx"), taken.get("--out"), taken.get("--triton-repository")
    kept, served = [], []
    for option, *values in given:
        words = [_RENAMED.get(option, option), *values]
        if option in _OF_REPOSITORIES:
            served += words
        elif option in ("--force", "--json") and repository is not None:
            kept += words
            served += words
        elif runtime == "cubin" and option in _OF_KERNELS:
            kept += _OF_KERNELS[option]
        # Flags that were off anyway, and what AOTInductor's command always does.
        elif option not in taken and not option.startswith("--no-") and (runtime, option) != ("aoti", "--sampler-only"):
            kept += words
    model = [taken[name] for name in ("--from", "--model") if name in taken][:1]
    lines = []
    if "--verify" in taken:
        lines.append(["verify", taken["--verify"], *model, *kept])
    elif out is not None or repository is None:
        lines.append(["export", runtime, *model, *([] if out is None else ["--out", out]), *kept])
    if repository is not None:
        lines.append(["export", "repository", *([out] if out is not None else model), "--out", repository, *served])
    return " && ".join(shlex.join(["fastddim", *line]) for line in lines)
